"""The one error that users see: a single line that says what is wrong and what to do."""


class MetisError(Exception):
    """Bad input, a missing file or an impossible request; the command line prints it and exits with 2."""


def must_match(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]], what: str) -> None:
    """MetisError that names the first tensor of ``what`` that the model lacks, that is missing, or of another shape."""
    wrong = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
    if wrong:
        key = wrong[0]
        raise MetisError(
            f"{what} does not fit the model: {len(wrong)} tensors differ, the first is {key} "
            f"(model {wanted.get(key, 'lacks it')}, file {given.get(key, 'lacks it')})"
        )
