"""What nano was asked to reach, beside what it measured: a table of ``results/nano/summary.json``."""

from __future__ import annotations

from typing import Any


def mean(rows: dict[str, Any], task: str, system: str, metric: str) -> float:
    """A score of a test set's rows."""
    return float(rows[task][system][metric]["mean"])


def bars(rows: dict[str, Any], unknown: bool) -> list[tuple[str, str, str, bool]]:
    """What was asked of a test set's rows: (what, bar, measured, whether it is met).

    ``unknown``: nobody of the set was heard in training, and it has all tasks; else only text-to-speech is asked for.
    """
    out: list[tuple[str, str, str, bool]] = []

    def add(what: str, bar: str, measured: str, met: bool) -> None:
        out.append((what, bar, measured, met))

    def of(task: str, metric: str, *systems: str) -> list[float]:
        return [mean(rows, task, system, metric) for system in systems]

    if "codec" in rows:
        pesq, stoi = (mean(rows, "codec", "resynthesis", metric) for metric in ("pesq_wb", "stoi"))
        recorded, coded, staged = of("codec", "wer", "recording", "resynthesis", "stage2")
        add("Codec, PESQ", "2.0", f"{pesq:.2f}", pesq >= 2.0)
        add("Codec, STOI", "0.88", f"{stoi:.2f}", stoi >= 0.88)
        add("Codec, WER", f"{recorded + 0.05:.2f} (recording and 5 points)", f"{coded:.2f}", coded <= recorded + 0.05)
        likeness = mean(rows, "codec", "stage2", "sim_prompt")
        add("Stage 2, WER", f"{recorded + 0.08:.2f} (recording and 8)", f"{staged:.2f}", staged <= recorded + 0.08)
        add("Stage 2, SIM to the prompt", "0.50", f"{likeness:.2f}", likeness >= 0.5)
    more = 0.15 if unknown else 0.08
    staged, said = of("tts", "wer", "stage2", "nano")
    add("TTS, WER", f"{staged + more:.2f} (stage 2 and {100 * more:.0f})", f"{said:.2f}", said <= staged + more)
    if not unknown:
        likeness = mean(rows, "tts", "nano", "sim_prompt")
        add("TTS, SIM to the prompt", "0.50", f"{likeness:.2f}", likeness >= 0.5)
        return out
    noisy, other, ours = of("se", "dnsmos_ovrl", "noisy", "nsnet2", "nano")
    bar = max(noisy + 0.5, other)
    add("SE, OVRL", f"{bar:.2f} (noisy and 0.5; above NSNet2)", f"{ours:.2f}", ours >= noisy + 0.5 and ours > other)
    coded, ours = of("se", "wer_10db", "resynthesis", "nano")
    add("SE, WER at 10 dB and more", f"{coded + 0.1:.2f} (codec and 10)", f"{ours:.2f}", ours <= coded + 0.1)
    mixed, ours = of("tse", "wer", "mixture", "nano")
    add("TSE, WER", f"{0.6 * mixed:.2f} (60 % of the mixture's)", f"{ours:.2f}", ours <= 0.6 * mixed)
    coded, ours = of("vc", "wer", "resynthesis", "nano")
    add("VC, WER", f"{coded + 0.12:.2f} (codec and 12)", f"{ours:.2f}", ours <= coded + 0.12)
    for task in ("tse", "vc"):
        nearer = mean(rows, task, "nano", "nearer")
        add(f"{task.upper()}, nearer to the wanted voice", "85 %", f"{100 * nearer:.0f} %", nearer >= 0.85)
    still, seen = (rows["l2s"][system]["wer"] for system in ("still", "nano"))
    add("L2S, WER", "0.70", f"{seen['mean']:.2f}", seen["mean"] <= 0.7)
    add("L2S, below a still face", f"{still['mean']:.2f}, intervals apart", f"{seen['mean']:.2f}",
        seen["ci95"][1] < still["ci95"][0])  # fmt: skip
    for task in ("tts", "vc", "se", "tse"):
        alone, ours = of(task, "wer", "nano", "nano-omni")
        add(f"Omni, WER of {task.upper()}", f"{1.25 * alone:.2f} (the task's own and a quarter)", f"{ours:.2f}",
            ours <= 1.25 * alone)  # fmt: skip
    alone, told = of("tse", "wer", "nano", "nano-omni-text")
    add("Omni, WER of TSE that is told the words", f"below {alone:.2f} (TSE's)", f"{told:.2f}", told < alone)
    return out


def table(summary: dict[str, Any]) -> str:
    """Markdown: what was asked, and what each test set gave."""
    lines = ["| | asked | measured | met |", "|---|---|---|---|"]
    for name, title in (("human", "human"), ("unseen", "voices never heard"), ("seen", "voices of the training")):
        if name in summary:
            lines.append(f"| **{title}** (`{name}`) | | | |")
            found = bars(summary[name], name != "seen")
            lines += [
                f"| {what} | {bar} | {measured} | {'yes' if met else 'no'} |" for what, bar, measured, met in found
            ]
    return "\n".join(lines)
