"""Token shards: the same bytes whatever happens on the way, and every way of reading them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
import torch

from metis_lib.data.shards import Shards, key_of, tokenise
from metis_lib.data.store import read_manifest, write_jsonl
from metis_lib.errors import MetisError
from metis_lib.pipeline import Metis

pytestmark = pytest.mark.data
HUMAN = Path(__file__).parents[1] / "eval" / "testsets" / "human"


def row(id: str, path: str | Path, duration: float, **more: Any) -> dict[str, Any]:
    return {
        "id": id, "path": str(path), "text": "Hello there.", "language": "en", "speaker": "s", "duration": duration,
        "split": "train", "source": "here", "licence": "CC0", "human": True, **more,
    }  # fmt: skip


def human_rows(count: int) -> list[dict[str, Any]]:
    """Spans of real speech, 0.5 to 1.6 s; two of each recording."""
    rows = []
    for i, path in enumerate(sorted(HUMAN.glob("*.flac"))[: -(-count // 2)]):
        for k in range(2):
            length = 0.5 + 0.1 * ((7 * i + 5 * k) % 12)
            rows.append(row(f"{path.stem}/{k}.x", path, length, start=0.2 + 0.9 * k, end=0.2 + 0.9 * k + length))
    return rows[:count]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "manifest.jsonl"
    write_jsonl(path, human_rows(24))
    return path


@pytest.fixture(scope="module")
def made(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten shards with features."""
    out = tmp_path_factory.mktemp("made")
    done = tokenise(manifest, out, system="debug", shard_items=5, features=True, device="cpu")
    assert done["shards"] == done["written"] == 5 and done["items"] == 24 and done["skipped"] == 0
    return out


# ---------------------------------------------------------------- kills

# Imports once and forks; a child does all the work.  Nothing is computed before a fork.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from metis_lib.compat import prepare_torchaudio
prepare_torchaudio()
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel
import inflect, phonemizer, soundfile, soxr, metis_lib.pipeline
from metis_lib.data.shards import tokenise

manifest, small, base = sys.argv[1:]
STEPS = ("open", "os.link", "os.rename", "os.remove")

def start(out, rows=manifest, die_at=None):
    pid = os.fork()
    if pid:
        return pid
    steps = 0
    def hook(event, arguments):
        nonlocal steps
        if event in STEPS and str(arguments[0]).startswith(out):
            steps += 1
            if steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    if die_at:
        sys.addaudithook(hook)
    try:
        tokenise(rows, out, system="debug", shard_items=2, device="cpu")
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def end(pid):
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("a run failed")
    return os.WIFSIGNALED(status)

begun = time.perf_counter()
end(start(f"{base}/whole"))
whole = time.perf_counter() - begun
kills, halfway, folder, rng = 0, 0, 0, random.Random(0)
while kills < 10:
    pid = start(f"{base}/killed-{folder}")
    time.sleep(rng.uniform(0, 0.8 * whole))
    os.kill(pid, signal.SIGKILL)
    if end(pid):
        kills += 1
        halfway += any(Path(f"{base}/killed-{folder}").glob("*.tar"))
    else:  # it was done before: go on in the next folder
        folder += 1
for k in range(folder + 1):
    end(start(f"{base}/killed-{k}"))
twins = [start(f"{base}/twins") for _ in range(2)]
[end(pid) for pid in twins]
end(start(f"{base}/small", small))
step = 1
while end(start(f"{base}/step-{step}", small, step)):
    end(start(f"{base}/step-{step}", small))
    step += 1
print(json.dumps({"kills": kills, "halfway": halfway, "steps": step - 1}))
"""


@pytest.fixture(scope="module")
def driven(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    if not hasattr(os, "fork"):
        pytest.skip("kills are tried where processes fork")
    base = tmp_path_factory.mktemp("driven")
    (base / "tmp").mkdir()
    write_jsonl(base / "small.jsonl", human_rows(4))
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, str(manifest), str(base / "small.jsonl"), str(base)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(base / "tmp")},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return base, json.loads(ran.stdout.splitlines()[-1])


def test_ten_kills_at_random_moments_change_no_byte(driven: tuple[Path, dict[str, int]]) -> None:
    base, facts = driven
    whole = files(base / "whole")
    assert facts["kills"] == 10 and facts["halfway"]  # some of them with shards there and shards to come
    assert len(whole) == 2 * 12 + 2 and "index.json" in whole and not any(name.endswith(".part") for name in whole)
    for folder in base.glob("killed-*"):
        assert files(folder) == whole


def test_a_kill_at_every_step_of_writing_changes_no_byte(driven: tuple[Path, dict[str, int]]) -> None:
    base, facts = driven
    assert facts["steps"] > 12  # two shards, their descriptions, settings and index are opened, named, removed
    for step in range(1, facts["steps"] + 1):
        assert files(base / f"step-{step}") == files(base / "small"), step


def test_two_processes_of_one_rank_do_no_harm(driven: tuple[Path, dict[str, int]]) -> None:
    base, _ = driven
    assert files(base / "twins") == files(base / "whole")


# ---------------------------------------------------------------- writing


def test_ranks_share_the_shards_and_write_the_same_bytes(
    manifest: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = dict(system="debug", shard_items=5, features=True, device="cpu", workers=1)
    first = tokenise(manifest, tmp_path, rank=2, world=3, **settings)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["tokens-000002.tar"]
    assert first["written"] == 1 and "items" not in first
    monkeypatch.setenv("RANK", "0")  # as torchrun says it
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert tokenise(manifest, tmp_path, **settings)["written"] == 2
    assert not (tmp_path / "index.json").exists()
    last = tokenise(manifest, tmp_path, rank=1, **settings)
    assert last["written"] == 2 and last["items"] == 24
    assert files(tmp_path) == files(made)


def test_other_settings_are_refused_in_one_line(manifest: Path, made: Path, tmp_path: Path) -> None:
    before = files(made)
    settings: dict[str, Any] = dict(system="debug", shard_items=5, features=True, device="cpu")
    with pytest.raises(MetisError, match=r"^[^\n]*shard_items 5 \(now 4\)[^\n]*another folder$"):
        tokenise(manifest, made, **settings | {"shard_items": 4})
    with pytest.raises(MetisError, match=r"weights_sha256 .*config"):
        tokenise(manifest, made, **settings | {"system": "nano"})
    rows = human_rows(24)
    write_jsonl(tmp_path / "other.jsonl", [rows[0] | {"text": "Something else."}, *rows[1:]])
    with pytest.raises(MetisError, match="manifest_sha256"):
        tokenise(tmp_path / "other.jsonl", made, **settings)
    assert files(made) == before


def test_a_finished_shard_is_never_rewritten(manifest: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(system="debug", shard_items=12, acoustic=False, device="cpu")
    tokenise(manifest, tmp_path, **settings)
    before = files(tmp_path)
    stats = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.glob("*.tar")}
    assert tokenise(manifest, tmp_path, **settings)["written"] == 0
    (tmp_path / "tokens-000001.tar").unlink()
    (tmp_path / "tokens-000000.json").unlink()  # the description is made again, the shard stays
    assert tokenise(manifest, tmp_path, **settings)["written"] == 2
    first = tmp_path / "tokens-000000.tar"
    assert stats[first.name] == (first.stat().st_ino, first.stat().st_mtime_ns)
    assert files(tmp_path) == before


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(manifest: Path, made: Path, tmp_path: Path) -> None:
    from metis_lib.data.shards import _HOST

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = tmp_path / f".tokens-000001.tar.{_HOST}.{gone.pid}.part"
    living = tmp_path / f".tokens-000001.tar.{_HOST}.{os.getppid()}.part"
    foreign = tmp_path / f".tokens-000001.tar.elsewhere.{gone.pid}.part"
    for part in (dead, living, foreign):
        part.write_bytes(b"half")
    settings: dict[str, Any] = dict(system="debug", shard_items=5, features=True, device="cpu", world=2)
    tokenise(manifest, tmp_path, rank=0, **settings)
    assert (dead.exists(), living.exists(), foreign.exists()) == (False, True, True)
    tokenise(manifest, tmp_path, rank=1, **settings)  # complete: no half shard is of use to anybody
    assert files(tmp_path) == files(made)


def test_bad_recordings_are_listed_and_left_out(tmp_path: Path) -> None:
    good, rate = soundfile.read(sorted(HUMAN.glob("cmu*.flac"))[0], dtype="float32")
    good = good[: 2 * rate]
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "noise.wav").write_bytes(os.urandom(4000))
    soundfile.write(tmp_path / "silent.wav", 0 * good, rate)
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(len(good)) == 99, np.nan, good), rate, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", good[: rate // 10], rate)
    soundfile.write(tmp_path / "good.wav", good, rate)
    soundfile.write(tmp_path / "eight.wav", good, rate, subtype="PCM_U8")
    soundfile.write(tmp_path / "eleven.wav", np.tile(good[:, None], (1, 11)), rate)
    soundfile.write(tmp_path / "long.wav", np.tile(good, 35), rate)
    soundfile.write(tmp_path / "whole.wav", good, rate)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "whole.wav").read_bytes()[: rate * 2])
    rows = [row(path.stem, path.name, 70.0 if path.stem == "long" else 2.0) for path in sorted(tmp_path.glob("*.wav"))]
    rows += [row("missing", "missing.wav", 2.0), row("span", "long.wav", 1.0, start=60.0, end=61.0)]
    rows += [row("outside", "long.wav", 1.0, start=80.0, end=81.0), row("mute", "good.wav", 2.0, text="...")]
    write_jsonl(tmp_path / "m.jsonl", rows)
    done = tokenise(tmp_path / "m.jsonl", tmp_path / "out", system="debug", shard_items=9, device="cpu")
    about = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("tokens-*.json"))]
    reasons = {bad["id"]: bad["reason"] for shard in about for bad in shard["skipped"]}
    said = {
        "empty": "empty", "noise": "not audio", "silent": "silent", "nan": "NaN", "short": "too short",
        "long": "too long", "cut": "cut short", "missing": "no recording", "outside": "span cannot be read",
    }  # fmt: skip
    assert set(reasons) == set(said) and done["skipped"] == len(said)
    assert all(words in reasons[id] and str(tmp_path) not in reasons[id] for id, words in said.items())
    shards = Shards(tmp_path / "out")
    records = {record["id"]: record for record, _ in (shards[i] for i in range(len(shards)))}
    assert set(records) == {"good", "whole", "eight", "eleven", "span", "mute"}
    assert "phones" in records["good"] and "phones" not in records["mute"]


def test_nothing_to_tokenise_is_an_error(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(MetisError, match="no rows of the split 'test'"):
        tokenise(manifest, tmp_path / "out", system="debug", split="test")
    write_jsonl(tmp_path / "m.jsonl", [row("a", "not-mounted/a.wav", 1.0)])
    with pytest.raises(MetisError, match="none of the recordings"):
        tokenise(tmp_path / "m.jsonl", tmp_path / "out", system="debug")
    with pytest.raises(MetisError, match="rank"):
        tokenise(manifest, tmp_path / "out", system="debug", rank=3, world=3)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("system", ["debug", "nano"])
def test_tokens_are_those_of_the_pipeline_whatever_the_batch(system: str, tmp_path: Path) -> None:
    paths = [HUMAN / f"{name}.flac" for name in ("cmu-cards", "cmu-something", "librivox-0890", "uqm-utwig-044-04")]
    write_jsonl(tmp_path / "m.jsonl", [row(p.stem, p, soundfile.info(str(p)).duration) for p in paths])
    for name, seconds in (("together", 60.0), ("alone", 0.1)):
        tokenise(
            tmp_path / "m.jsonl", tmp_path / name, system=system, features=True, batch_seconds=seconds, device="cpu"
        )
    together, alone = Shards(tmp_path / "together"), Shards(tmp_path / "alone")
    metis = Metis.from_pretrained(system, device="cpu")
    for i, path in enumerate(paths):
        record, tokens, features = together[i]
        wanted = metis.tokens(path)
        frames = min(len(wanted["ssl"]), len(wanted["acoustic"]))
        assert record["id"] == path.stem and record["frames"] == frames
        assert tokens.dtype == np.int16 and tokens.shape == (frames, 1 + 12)
        np.testing.assert_array_equal(tokens[:, 0], wanted["ssl"][:frames])
        np.testing.assert_array_equal(tokens[:, 1:], wanted["acoustic"][:frames])
        np.testing.assert_array_equal(tokens, alone[i][1])
        from_pipeline = metis.features(metis._hear(path, 0.2, 60.0))[0, :frames]
        assert features.dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(features).float(), from_pipeline, atol=4e-3, rtol=1e-3)


def test_a_span_has_the_tokens_of_its_samples(manifest: Path, made: Path) -> None:
    metis, shards = Metis.from_pretrained("debug", device="cpu"), Shards(made)
    for i, source in enumerate(read_manifest(manifest)[:4]):
        wav, rate = soundfile.read(source.audio, dtype="float32")
        assert source.start is not None and source.end is not None
        wanted = metis.tokens((wav[round(source.start * rate) : round(source.end * rate)], rate))
        np.testing.assert_array_equal(shards[i][1][:, 0], wanted["ssl"][: len(shards[i][1])])


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("id", ["plain-1", "a.b/c.d", "ünï cödé", "x" * 200, ".", "a%2Eb"])
def test_keys_are_legal_and_lead_back_to_the_id(id: str) -> None:
    key = key_of(id)
    assert key and not set("./\\ ") & set(key) and key.isascii() and len(key) <= 80
    assert unquote(key) == id or len(id) > 80
    assert key_of(id + "y") != key


def test_random_access_equals_the_tar_read_from_its_start(manifest: Path, made: Path) -> None:
    rows, shards, i = read_manifest(manifest), pickle.loads(pickle.dumps(Shards(made))), 0
    for path in sorted(made.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
            for three in zip(members[::3], members[1::3], members[2::3], strict=True):
                raw = [tar.extractfile(member).read() for member in three]  # type: ignore[union-attr]
                record, tokens, features = shards[i]
                assert [m.name for m in three] == [
                    key_of(rows[i].id) + end for end in (".json", ".tokens.npy", ".features.npy")
                ]
                assert json.loads(raw[0]) == record
                assert raw[1].endswith(tokens.tobytes()) and raw[2].endswith(features.tobytes())
                assert record.pop("frames") == len(tokens) and record.pop("phones")[:2] == ["h", "ə"]
                assert record == {k: v for k, v in vars(rows[i]).items() if k != "root" and v is not None}
                i += 1
    assert i == len(shards) == 24 and shards[-1][0] == shards[23][0]
    assert shards.lengths().tolist() == [len(shards[k][1]) for k in range(24)]
    with pytest.raises(IndexError):
        shards[24]


def test_webdataset_reads_them(made: Path) -> None:
    import webdataset

    dataset = webdataset.WebDataset(sorted(map(str, made.glob("*.tar"))), shardshuffle=False).decode()
    shards = Shards(made)
    seen = list(dataset)
    assert len(seen) == len(shards)
    for i, sample in enumerate(seen):
        record, tokens, features = shards[i]
        assert unquote(sample["__key__"]) == record["id"] and sample["json"] == record
        np.testing.assert_array_equal(sample["tokens.npy"], tokens)
        np.testing.assert_array_equal(sample["features.npy"], features)


def test_damage_is_named_with_its_remedy(manifest: Path, made: Path, tmp_path: Path) -> None:
    for name, content in files(made).items():
        (tmp_path / name).write_bytes(content)
    settings: dict[str, Any] = dict(system="debug", shard_items=5, features=True, device="cpu")
    cut, flipped = tmp_path / "tokens-000001.tar", tmp_path / "tokens-000003.tar"
    cut.write_bytes(cut.read_bytes()[:-10240])
    content = bytearray(flipped.read_bytes())
    content[5000] ^= 1
    flipped.write_bytes(content)
    shards = Shards(tmp_path)
    assert shards[4][0]["id"] == Shards(made)[4][0]["id"]
    with pytest.raises(MetisError, match=r"tokens-000001\.tar .*damaged; delete .*metis prepare tokens"):
        shards[5]
    with pytest.raises(MetisError, match=r"tokens-000001\.tar, .*tokens-000003\.tar .*delete"):
        shards.verify()
    with pytest.raises(MetisError, match=r"tokens-000001\.tar .*delete"):
        tokenise(manifest, tmp_path, **settings)
    cut.unlink()
    flipped.unlink()
    assert tokenise(manifest, tmp_path, **settings)["written"] == 2
    Shards(tmp_path).verify()
    assert files(tmp_path) == files(made)
    (tmp_path / "index.json").unlink()
    with pytest.raises(MetisError, match="index.json"):
        Shards(tmp_path)
