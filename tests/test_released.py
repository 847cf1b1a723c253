"""Released checkpoints: every file of the published layout, in tiny sizes, loads exactly or is refused by name."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from metis_lib import assets, cli, convert
from metis_lib.checkpoints import SHIPPED, TaskConfig, fill, load_config_and_card, load_state, own_system, save_part
from metis_lib.config import (
    AcousticCodecConfig,
    LipConfig,
    SemanticCodecConfig,
    SSLConfig,
    Stage1Config,
    Stage2Config,
    SystemConfig,
    preset,
    to_dict,
)
from metis_lib.errors import MetisError
from metis_lib.evaluation import record
from metis_lib.models import adapt
from metis_lib.models.stage1 import Stage1
from metis_lib.models.stage2 import Stage2
from metis_lib.released import Released
from metis_lib.released_files import FILES, variants
from metis_lib.tasks import TASKS
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.lips import LipEncoder
from metis_lib.tokenizers.semantic import SemanticCodec
from metis_lib.tokenizers.ssl import SSLEncoder

pytestmark = pytest.mark.paper

GOLDEN = Path(__file__).parent / "golden"
TINY = SystemConfig(
    "tiny",
    SSLConfig(16, 5, 3, 2, 32),
    SemanticCodecConfig(16, 64, 8, 16, 32, 1),
    AcousticCodecConfig(
        encoder_dim=4, latent_dim=16, codebook_size=32, vocos_dim=16, vocos_intermediate_dim=32, vocos_num_layers=1
    ),
    Stage1Config(32, 2, 4, 64, cond_dim=16),
    Stage2Config(1, True, 32, 1, 4, 32, 64),
    Stage2Config(12, False, 32, 1, 4, 32, 64),
    LipConfig(4, (4, 6, 8, 10), 2, 24, 2, 40, 2, 31),
)  # fmt: skip
GATED = {"adapter": "gated"}
STAGE1 = {
    "metis_base/model": {},
    "metis_vc/metis_vc": GATED,
    "metis_tse/metis_tse": GATED,
    "metis_se/metis_se": GATED,
    "t2s_model/model": {"use_phones": True},
    "metis_omni/metis_omni": GATED | {"use_phones": True},
    "metis_l2s/metis_l2s": {"adapter": "plain", "cond_dim": 24},
}
VISUAL = {
    "adim": 24, "aheads": 2, "eunits": 40, "elayers": 2, "dropout_rate": 0.1, "macaron_style": 1, "use_cnn_module": 1,
    "transformer_input_layer": "conv3d", "transformer_encoder_attn_layer_type": "rel_mha", "rel_pos_type": "latest",
    "cnn_module_kernel": 31, "zero_triu": False, "relu_type": "swish", "dlayers": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Neither a hub nor a cache of this machine."""
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def put(folder, name, state, metadata={"format": "pt"}):  # noqa: B006
    path = folder / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().clone() for key, value in state.items()}, path, metadata=metadata)


def noise(module):
    """Its state dict with random numbers everywhere."""
    with torch.no_grad():
        for value in module.state_dict().values():
            value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.tensor(7))
    return module.state_dict()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with every released file, and what the files hold by path."""
    torch.manual_seed(0)
    folder, held = tmp_path_factory.mktemp("hub") / "metis", {}
    for name, changes in STAGE1.items():
        held[name] = noise(Stage1(replace(TINY.stage1, **changes)))
    for task, rank in (("vc", 16), ("tse", 32), ("se", 32)):
        model = Stage1(replace(TINY.stage1, **GATED))
        adapt.add_lora(model, rank)
        noise(model)
        held[f"metis_{task}/metis_{task}_lora_{rank}"] = adapt.lora_state(model)
        added = {f"model.{key}": value for key, value in model.state_dict().items() if key.startswith("cond_adapter.")}
        held[f"metis_{task}/metis_{task}_lora_{rank}_adapter"] = added
    codec = AcousticCodec(TINY.acoustic)
    held["acoustic_codec/model"], held["acoustic_codec/model_1"] = noise(codec.encoder), noise(codec.decoder)
    held["semantic_codec/model"] = noise(SemanticCodec(TINY.semantic))
    odd = {"diff_estimator.embed_tokens.weight": torch.empty(0, 256)}
    held["s2a_model/s2a_model_1layer/model"] = noise(Stage2(TINY.stage2_layer1)) | odd
    held["s2a_model/s2a_model_full/model"] = noise(Stage2(TINY.stage2_full)) | odd
    held["w2v-bert-2.0/model"] = noise(SSLEncoder(replace(TINY.ssl, output_layer=5)).model)
    for name, state in held.items():
        put(folder, name, state, None if "_lora_" in name else {"format": "pt"})
    held["visual"] = {f"encoder.{key}": value for key, value in noise(LipEncoder(TINY.lips)).items()}
    other = {"decoder.embed.weight": torch.zeros(3), "ctc.ctc_lo.bias": torch.zeros(2)}
    torch.save(held["visual"] | other, folder / "metis_l2s" / "vis_model.pth")
    (folder / "metis_l2s" / "vis_model.json").write_text(json.dumps([9216, 41, VISUAL]))
    torch.save({"mean": torch.randn(16), "var": torch.rand(16) + 0.1}, folder / "wav2vec2bert_stats.pt")
    shutil.copyfile(GOLDEN / "vocab.json", folder / "vocab.json")
    (folder / "config.json").write_text(json.dumps({"type": "SystemConfig", "config": to_dict(TINY)}))
    return folder, held


@pytest.fixture
def copy(place, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(place[0], tmp_path / "copy"))


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


# --- what the folder holds comes out as it is


def test_every_released_file_is_in_the_folder_and_loads(place, monkeypatch):
    released = Released(place[0])
    assert released.tasks == ("tts", "vc", "tse", "se", "l2s", "omni") and released.config == TINY
    with monkeypatch.context() as patched:  # a task of one's own was not released
        patched.setitem(TASKS, "declip", replace(TASKS["se"], name="declip"))
        assert released.tasks == ("tts", "vc", "tse", "se", "l2s", "omni")
    assert "CC BY-NC 4.0" in released.licence and released.name == str(place[0])
    assert all(released.find(name) for name in FILES) and len(FILES) == 20
    for task in (*released.tasks, "base"):
        for variant in (None, *variants(task)):
            released.require(task, variant)


PARTS = {
    "semantic": "semantic_codec/model",
    "stage1": "metis_base/model",
    "stage2_layer1": "s2a_model/s2a_model_1layer/model",
    "stage2_full": "s2a_model/s2a_model_full/model",
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_hold_what_the_file_holds(place, name):
    folder, held = place
    module = Released(folder).part(name)
    wanted = {key: value for key, value in held[PARTS[name]].items() if "embed_tokens" not in key}
    same(module.state_dict(), wanted)
    assert not module.training and {value.dtype for value in module.parameters()} == {torch.float32}


def test_codec_with_and_without_encoder(place):
    folder, held = place
    whole, half = (Released(folder).part(name) for name in ("acoustic", "acoustic_decoder"))
    same(whole.encoder.state_dict(), held["acoustic_codec/model"])
    for codec in (whole, half):
        same(codec.decoder.state_dict(), held["acoustic_codec/model_1"])
    codes = whole.encode(torch.randn(1, 4800))
    assert torch.equal(whole.decode(codes), half.decode(codes))
    with pytest.raises(MetisError, match="only decode"):
        half.encode(torch.randn(1, 4800))


def test_ssl_skips_upper_layers_and_gets_its_statistics(place):
    folder, held = place
    encoder = Released(folder, dtype=torch.bfloat16).part("ssl")
    wanted = {key: value for key, value in held["w2v-bert-2.0/model"].items() if ".layers.3." not in key}
    wanted = {key: value.bfloat16() for key, value in wanted.items() if ".layers.4." not in key}
    same(encoder.model.state_dict(), wanted)
    same(encoder.stats_state(), torch.load(folder / "wav2vec2bert_stats.pt"))  # fp32
    features, frames = encoder.encode([torch.randn(8000)])
    assert features.shape == (1, 24, 16) and features.dtype == torch.float32 and frames.tolist() == [24]


def test_lips_of_both_layouts(place, copy):
    folder, held = place
    wanted = {key.removeprefix("encoder."): value for key, value in held["visual"].items()}
    encoder = Released(folder).part("lips")
    same(encoder.state_dict(), wanted)
    assert encoder(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).shape == (1, 3, 24)
    renamed = {key.removeprefix("encoder.") if "frontend" in key else key: v for key, v in held["visual"].items()}
    renamed = {key.replace("encoder.embed.0.", "proj_encoder."): value for key, value in renamed.items()}
    torch.save(renamed, copy / "vis_model.pth", _use_new_zipfile_serialization=False)
    (copy / "metis_l2s" / "vis_model.pth").unlink()
    same(Released(copy).part("lips").state_dict(), wanted)


@pytest.mark.parametrize("variant", ["full", "lora", None])
@pytest.mark.parametrize("task", ["tts", "vc", "tse", "se", "l2s", "omni"])
def test_tasks(place, task, variant):
    folder, held = place
    if variant and variant not in variants(task):
        with pytest.raises(MetisError, match=f"{task} has no variant 'lora'; there is: full"):
            Released(folder).task(task, variant)
        return
    config, state = Released(folder).task(task, variant)
    kind = variant or ("lora" if task in ("se", "tse") else "full")
    rank = 0 if kind == "full" else 16 if task == "vc" else 32
    assert (config.task, config.lora_rank) == (task, rank)
    model = Stage1(replace(TINY.stage1, **config.stage1))
    if kind == "full":
        file = "t2s_model/model" if task == "tts" else f"metis_{task}/metis_{task}"
        same(state, held[file])
        fill(model, state, "here")
        return
    lora = {key: value for key, value in state.items() if ".lora_" in key}
    same(lora, held[f"metis_{task}/metis_{task}_lora_{rank}"])
    adapter = {f"model.{key}": value for key, value in state.items() if key not in lora}
    same(adapter, held[f"metis_{task}/metis_{task}_lora_{rank}_adapter"])
    assert adapt.check_lora(model, lora) == rank


@torch.no_grad()
def test_a_part_runs_and_can_be_moved_and_changed(place):
    folder, _ = place
    released = Released(folder, dtype=torch.float64)
    model = released.part("stage1")
    out = model.generate(torch.zeros(1, 2, dtype=torch.long), 4, generator=torch.Generator().manual_seed(0))
    assert out.shape == (1, 4) and model.to_logit.weight.dtype == torch.float64
    model = Released(folder).part("stage1")
    model.to_logit.weight.zero_()  # memory-mapped, but ours
    assert Released(folder).part("stage1").to_logit.weight.abs().sum() > 0


def test_phones(place):
    folder, _ = place
    phones = Released(folder).phones()
    assert phones.size == 1024 and phones.pad_id == 1023 and len(phones.vocab) == 363


@pytest.mark.golden
def test_stage2_of_the_released_code_has_these_keys():
    golden = {key.split("/")[-1] for key in load_file(GOLDEN / "s2a.safetensors") if key.startswith("sd/")}
    ours = set(Stage2(Stage2Config(12, False, 8, 9, 2, 4, 4)).state_dict()) | {"diff_estimator.embed_tokens.weight"}
    assert golden and golden <= ours


# --- what does not fit is refused, file and tensor named


def spoil(path, change):
    state = load_file(path)
    change(state)
    put(path.parent, path.stem, state)


def drop(key):
    return lambda state: state.pop(key)


def add(key):
    return lambda state: state.update({key: torch.zeros(2)})


def cut(key):
    return lambda state: state.update({key: state[key][:-1]})


def whole_numbers(key):
    return lambda state: state.update({key: state[key].to(torch.int8)})


def misspell(key):
    return lambda state: state.update({key.replace("q_proj", "q_porj"): state.pop(key)})


def narrow(state):
    for key, value in state.items():
        if "lora_A" in key and value.shape[1] == 32:
            state[key] = value[:, :-4]


def test_a_lora_goes_with_its_own_adapter(copy):
    """What else lies beside it is neither taken for it nor preferred to it in silence."""
    place = copy / "metis_se"
    published = [place / f"metis_se_lora_32{ending}.safetensors" for ending in ("", "_adapter")]
    own = [place / f"metis_se_lora_16{ending}.safetensors" for ending in ("", "_adapter")]
    released = Released(copy)
    assert [released.find(name) for name in ("se_lora", "se_adapter")] == published
    for old, new in zip(published, own, strict=True):
        shutil.copy(old, new)
    for name in ("se_lora", "se_adapter"):
        with pytest.raises(MetisError, match="several LoRA weights .*lora_16.*lora_32.*leave one"):
            released.find(name)
    published[0].unlink()  # its adapter is left, and fits by its shapes
    assert [released.find(name) for name in ("se_lora", "se_adapter")] == own
    own[1].unlink()
    assert released.find("se_lora") == own[0] and released.find("se_adapter") is None


def test_lips_are_found_beside_a_pinned_revision(tmp_path, monkeypatch):
    """They are on no hub; of what is there, which revision lies in the folder nobody can tell."""
    home = tmp_path / "home" / "released"
    for path in ("metis_l2s/vis_model.pth", "metis_se/metis_se.safetensors"):
        (home / path).parent.mkdir(parents=True)
        (home / path).touch()
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "home"))
    pinned = Released("amphion/metis@0123abc")
    assert pinned.find("lips") == home / FILES["lips"].path and pinned.find("se_full") is None


def test_chinese_is_read_by_the_lexicon_of_the_folder(copy):
    pytest.importorskip("jieba")
    plain = Released(copy).phones().phones("长大", "zh")
    before = record.checkpoint_hashes(str(copy))["config_sha256"]
    (copy / "chinese_lexicon.txt").write_text("长大 chang2 da4\n", encoding="utf-8")
    assert Released(copy).phones().phones("长大", "zh") != plain
    assert record.checkpoint_hashes(str(copy))["config_sha256"] != before


LORA = "model.diff_estimator.layers.0.self_attn.q_proj.lora_A.default.weight"
SPOILT = {
    "missing": ("base", drop("to_logit.bias"), "to_logit.bias"),
    "extra": ("base", add("to_logit.scale"), "to_logit.scale"),
    "shape": ("base", cut("cond_emb.weight"), "cond_emb.weight"),
    "integers": ("base", whole_numbers("cond_emb.weight"), "cond_emb.weight"),
    "ssl layer": ("ssl", drop("encoder.layers.2.ffn1.intermediate_dense.bias"), "layers.2.ffn1.inter"),
    "ssl upper layer": ("ssl", add("encoder.layers.4.scale"), "encoder.layers.4.scale"),
    "ssl too many layers": ("ssl", add("encoder.layers.5.ffn1_layer_norm.bias"), "encoder.layers.5.ffn1"),
    "ssl prefix": ("ssl", add("wav2vec2_bert.masked_spec_embed"), "wav2vec2_bert.masked_spec_embed"),
    "codec": ("semantic", cut("quantizer.quantizers.0.codebook.weight"), "codebook.weight"),
    "codec encoder": ("acoustic_encoder", drop("block.0.weight_g"), "block.0.weight_g"),
    "codec decoder": ("acoustic_decoder", drop("model.head.istft.window"), "model.head.istft.window"),
    "stage 2": ("stage2_full", drop("token_emb.11.weight"), "token_emb.11.weight"),
    "stage 2 oddity": ("stage2_full", add("diff_estimator.embed_tokens.weight"), "embed_tokens.weight"),
    "lora misspelt": ("se_lora", misspell(LORA), "layers.0.self_attn.q_p"),
    "lora incomplete": ("se_lora", drop(LORA), LORA),
    "lora of mixed ranks": ("se_lora", cut(LORA.replace("q_proj", "v_proj")), "v_proj.lora_A"),
    "lora of another width": ("se_lora", narrow, "lora_A.default.weight"),
    "adapter of another width": ("se_adapter", cut("model.cond_adapter.out_linear.weight"), "out_linear.weight"),
    "adapter without gate": ("se_adapter", drop("model.cond_adapter.gate_scale"), "gate_scale"),
    "full without adapter": ("vc_full", drop("cond_adapter.gate_scale"), "gate_scale"),
}  # fmt: skip


def load(released, name):
    """Load whatever needs a file."""
    file = FILES[name]
    if file.task:
        return released.task(file.task, "full" if file.fills == "stage1" else "lora")
    parts = {"base": "stage1", "acoustic_encoder": "acoustic"}
    return released.part(parts.get(name, name))


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_file_is_refused(copy, case):
    name, change, key = SPOILT[case]
    path = Released(copy).find(name)
    spoil(path, change)
    with pytest.raises(MetisError) as caught:
        load(Released(copy), name)
    message = str(caught.value)
    assert str(path) in message and key in message and " tensors are wrong" in message and "\n" not in message
    rows = {row["file"]: row for row in convert.verify(Released(copy))}
    assert [name for name, row in rows.items() if row["status"] != "ok"] == [name]
    assert rows[name]["note"] == message


@pytest.mark.parametrize("name", ["base", "ssl", "acoustic_decoder", "se_lora", "lips"])
def test_a_truncated_file_is_refused(copy, name):
    path = Released(copy).find(name)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MetisError, match="damaged") as caught:
        load(Released(copy), name)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


SWAPPED = [
    ("base", "stage2_full"), ("se_lora", "se_adapter"), ("vc_full", "base"), ("semantic", "acoustic_decoder"),
    ("stage2_layer1", "stage2_full"), ("acoustic_encoder", "acoustic_decoder"), ("ssl", "semantic"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "other"), SWAPPED)
def test_the_file_of_something_else_is_refused(copy, name, other):
    released = Released(copy)
    shutil.copyfile(released.find(other), released.find(name))
    with pytest.raises(MetisError, match="does not fit") as caught:
        load(released, name)
    assert str(released.find(name)) in str(caught.value)


class Code:
    """What a pickle can do when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("opened"),)


@pytest.mark.parametrize("name", ["wav2vec2bert_stats.pt", "metis_l2s/vis_model.pth"])
def test_a_pickle_with_code_is_not_opened(copy, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for save in (
        lambda: torch.save({"mean": Code()}, copy / name),
        lambda: (copy / name).write_bytes(pickle.dumps(Code())),
    ):
        save()
        with pytest.raises(MetisError, match="holds code") as caught:
            Released(copy).part("lips" if "vis" in name else "ssl")
        assert name in str(caught.value) and not Path("opened").exists()


def test_other_faults_of_statistics_lips_and_phones(copy):
    for stats in ({"mean": torch.zeros(16)}, {"mean": torch.zeros(3), "var": torch.ones(3)}, [1]):
        torch.save(stats, copy / "wav2vec2bert_stats.pt")
        with pytest.raises(MetisError, match=r"wav2vec2bert_stats.pt does not hold .* 16 channels"):
            Released(copy).part("ssl")
    (copy / "vocab.json").write_text("[]")
    with pytest.raises(MetisError, match=r"vocab\.json"):
        Released(copy).phones()
    path = copy / "metis_l2s" / "vis_model.pth"
    state = torch.load(path)
    torch.save({key: value for key, value in state.items() if key != "encoder.embed.0.bias"}, path)
    with pytest.raises(MetisError, match=r"vis_model.pth: encoder.embed.0.bias"):
        Released(copy).part("lips")
    torch.save({"state_dict": state}, path)
    with pytest.raises(MetisError, match=r"vis_model.pth is no state dict"):
        Released(copy).part("lips")
    (copy / "metis_l2s" / "vis_model.json").write_text("{")
    with pytest.raises(MetisError, match=r"vis_model.json"):
        Released(copy).part("lips")


def test_published_tables_are_verified(copy):
    document = {"type": "SystemConfig", "config": to_dict(preset("paper"))}
    (copy / "config.json").write_text(json.dumps(document))
    (copy / "vocab.json").write_text((copy / "vocab.json").read_text() + " ")
    for name in ("vocab.json", "wav2vec2bert_stats.pt"):
        with pytest.raises(MetisError, match=f"{name} is not the published file"):
            Released(copy).path(name)
    (copy / "vocab.json").unlink()
    with pytest.raises(
        MetisError, match=r"metis-tables: vocab.json cannot be fetched; get it from https://raw.*assets"
    ):
        Released(copy).phones()


def test_missing_files_and_unknown_names(copy, tmp_path):
    (copy / "metis_base" / "model.safetensors").unlink()
    with pytest.raises(MetisError, match=r"lacks metis_base/model.safetensors; get it by: hf download amphion/metis"):
        Released(copy).require("se", "lora")
    assert Released(copy).variant("se", None) == "full"  # what is there
    (copy / "metis_l2s" / "vis_model.pth").unlink()
    with pytest.raises(MetisError, match=r"vis_model.pth .*LRS3_V_WER19.1"):
        Released(copy).require("l2s")
    with pytest.raises(MetisError, match="unknown part 'decoder'"):
        Released(copy).part("decoder")
    with pytest.raises(MetisError, match="unknown task 'asr'"):
        Released(copy).require("asr")
    for where in (tmp_path / "nowhere", "./nowhere", "nowhere", "a/b/c"):
        with pytest.raises(MetisError, match="unknown model .*no such folder"):
            Released(where)


def test_files_may_lie_beside_the_folder(copy):
    parent = copy.parent
    for name in ("semantic_codec", "acoustic_codec", "s2a_model", "t2s_model"):
        (parent / "MaskGCT").mkdir(exist_ok=True)
        (copy / name).rename(parent / "MaskGCT" / name)
    (copy / "w2v-bert-2.0").rename(parent / "w2v-bert-2.0")
    Released(copy).require("tts")
    (parent / "MaskGCT").rename(copy / "MaskGCT")
    Released(copy).require("tts")


# --- the hub


@pytest.fixture
def hub(place, monkeypatch):
    """The hub as a folder; what was asked of it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    asked = []

    def download(repo, path, *, revision=None, local_files_only=False):
        asked.append((repo, path, revision))
        if download.offline:
            raise LocalEntryNotFoundError("offline\nand more lines")
        if path == "metis_vc/metis_vc.safetensors" and revision != "refs/pr/9" or "metis_se.safe" in path:
            raise RemoteEntryNotFoundError("404", response=Response())
        return str(place[0] / ("w2v-bert-2.0" if repo.startswith("facebook") else "") / path)

    class Response:
        headers, request, status_code = {}, None, 404

    download.offline, download.asked = False, asked
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return download


def tiny_home(place):
    """What is under METIS_HOME/released serves a hub id too."""
    home = assets.metis_home() / "released"
    home.mkdir(parents=True)
    for name in ("config.json", "vocab.json", "wav2vec2bert_stats.pt"):
        shutil.copy(place[0] / name, home / name)


def test_the_hub_is_asked_file_by_file(place, hub):
    tiny_home(place)
    released = Released(revision="abc")
    assert released.name == "amphion/metis" and hub.asked == [] and len(released.tasks) == 6
    released.require("se")
    assert [path for repo, path, _ in hub.asked if repo == "amphion/metis"] == [
        "metis_base/model.safetensors",
        "metis_se/metis_se_lora_32_adapter.safetensors",
        "metis_se/metis_se_lora_32.safetensors",
    ]
    assert {repo: revision for repo, _, revision in hub.asked} == {
        "amphion/metis": "abc", "amphion/MaskGCT": None, "facebook/w2v-bert-2.0": None,
    }  # fmt: skip
    assert not any("semantic" in path or path == "acoustic_codec/model.safetensors" for _, path, _ in hub.asked)
    same(released.part("stage1").state_dict(), place[1]["metis_base/model"])
    Released("someone/mirror").path("base")
    assert hub.asked[-1] == ("someone/mirror", "metis_base/model.safetensors", None)


def test_a_file_of_a_pull_request_is_found(place, hub):
    tiny_home(place)
    assert Released().task("vc")[0].lora_rank == 0
    assert [revision for _, _, revision in hub.asked] == [None, "refs/pr/9"]
    with pytest.raises(MetisError, match="metis_vc.safetensors of amphion/metis: the hub has no such file .*lora"):
        Released(revision="main").require("vc")
    with pytest.raises(MetisError, match="the hub has no such file .*lora is there"):
        Released().require("se", "full")


def test_offline_says_what_to_do(place, hub, tmp_path):
    hub.offline = True
    with pytest.raises(MetisError) as caught:
        Released().part("stage1")
    message = str(caught.value)
    assert "\n" not in message and "HF_ENDPOINT" in message
    assert f"hf download amphion/metis metis_base/model.safetensors --local-dir {tmp_path}/home/released" in message
    with pytest.raises(MetisError, match=r"metis-tables: vocab.json cannot be fetched"):
        Released().phones()
    with pytest.raises(MetisError, match=r"no .*vocab.json; get it from https"):
        Released(local_files_only=True).phones()


def test_the_real_client_is_offline_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MetisError, match="not in the cache") as caught:
        Released(local_files_only=True).path("base")
    assert "\n" not in str(caught.value)


# --- sizes


def test_sizes_are_those_of_the_published_files():
    found = convert.sizes(preset("paper"))
    assert found.keys() == FILES.keys()
    for name, file in FILES.items():
        assert file.bytes in (0, found[name]["bytes"]), name
    known = dict(
        vc_full=2966748564, omni_full=3048568732, l2s_full=2960456992, se_lora=72382776, se_adapter=62945788
    )  # fmt: skip
    assert {name: found[name]["bytes"] for name in known} == known
    millions = dict(
        base=725.94, se_full=741.68, tse_full=741.68, vc_full=741.68, tts_full=746.40, omni_full=762.14,
        l2s_full=740.11, stage2_layer1=330.35, stage2_full=353.44, semantic=44.29, acoustic_encoder=42.54,
        acoustic_decoder=128.20, ssl=580.49, lips=182.03, se_lora=18.09, vc_lora=9.04, se_adapter=15.74,
    )  # fmt: skip
    for name, size in millions.items():
        assert found[name]["parameters"] / 1e6 == pytest.approx(size, abs=0.005), name


def test_sizes_are_exact_to_the_byte(place):
    for name, row in convert.sizes(TINY).items():
        if name != "lips":
            assert Released(place[0]).find(name).stat().st_size == row["bytes"], name


def test_a_name_tells_variant_revision_and_wiring(place, hub, tmp_path):
    folder = str(place[0])
    assert [Released(folder + mark).variant("vc", None) for mark in ("", "@full", "@lora")] == ["full", "full", "lora"]
    assert Released(f"{folder}@lora").variant("vc", "full") == "full"
    with pytest.raises(MetisError, match="tts has no variant 'lora'"):
        Released(f"{folder}@lora").require("tts")
    tiny_home(place)
    Released("amphion/metis@v1.2@lora").require("se")
    assert ("amphion/metis", "metis_se/metis_se_lora_32.safetensors", "v1.2") in hub.asked
    odd = shutil.copytree(folder, tmp_path / "at@home" / "metis")  # a folder's own name stays as it is
    assert Released(odd).preferred is None and Released(f"{odd}@lora").preferred == "lora"
    for wrong in ("@lroa", "@lora@full", "@", "@lora@"):
        with pytest.raises(MetisError, match="behind the name may stand"):
            Released(folder + wrong)
    for wrong in ("amphion/metis@v1@v2", "amphion/metis@"):
        with pytest.raises(MetisError, match="behind the name may stand"):
            Released(wrong)
    with pytest.raises(MetisError, match="holds none"):
        Released(f"{SHIPPED / 'nano'}@lora")
    assert Released(f"{folder}@lora").tasks == ("vc", "tse", "se")
    assert Released("amphion/metis@v1.2").find("base") is None  # nobody knows which one lies in released/


def test_bare_names_with_marks(place, monkeypatch):
    monkeypatch.chdir(place[0].parent)
    assert not own_system("metis@lora") and Released("metis@lora").name == "metis@lora"
    with pytest.raises(MetisError, match="unknown model 'nowhere@lora'"):
        Released("nowhere@lora")


def test_variants_are_rows_of_an_evaluation(place, tmp_path, monkeypatch):
    from metis_lib.evaluation import record, systems

    folder, item = str(place[0]), systems.load_items("human", "se")[0]
    names = [f"{folder}{mark}" for mark in ("@lora", "@full", "@released")]
    assert systems.choose_systems("se", names, folder) == names
    with pytest.raises(MetisError, match="twice"):
        systems.choose_systems("se", [*names, names[0]], folder)
    maker = systems.Systems(folder, "cpu", options={"steps": 1})
    clips = systems.produce([item], names, tmp_path, maker=maker)
    assert [clip.system for clip in clips] == ["metis@lora", "metis@full", "metis@released"]
    sounds = [clip.path.read_bytes() for clip in clips]
    assert len(set(sounds)) == 3 and maker.metis(names[2]).compat == "released" != maker.metis(names[0]).compat
    assert systems.systems_of("vc", names[0]) == ["source", "resynthesis", names[0]]  # no Omni, it has one variant
    assert f"{names[1]}-omni" in systems.systems_of("se", names[1]) and names[0] not in systems.systems_of(
        "tts", names[0]
    )
    assert systems.label("amphion/metis@refs/pr/9-omni") == "metis@refs-pr-9-omni"
    kinds = [record.checkpoint_hashes(name)["variants"]["se"] for name in names]
    assert kinds == ["lora", "full", "lora"] and "tts" not in record.checkpoint_hashes(names[0])["variants"]


# --- conversion, export, the command line


def tensors(folder):
    return {path.relative_to(folder).as_posix(): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def test_there_and_back(place, tmp_path):
    from metis_lib.pipeline import Metis

    folder, held = place
    own, back = tmp_path / "own", tmp_path / "back"
    said = []
    convert.to_own(folder, own, say=said.append)
    assert "CC BY-NC 4.0" in said[0]
    metis = Metis.from_pretrained(own, device="cpu")
    assert set(metis.tasks) == {"tts", "vc", "tse", "se", "l2s", "omni"}
    same(metis.semantic.state_dict(), held["semantic_codec/model"])
    same(metis.ssl.stats_state(), torch.load(folder / "wav2vec2bert_stats.pt"))
    assert "CC BY-NC" in load_config_and_card(own / "tasks" / "se", TaskConfig)[1]["licence"]
    convert.to_released(own, back)
    assert not list(tmp_path.glob(".*.part")) and not list(back.rglob("*.part"))
    first, second = tensors(folder), tensors(back)
    gone = {"metis_se/metis_se.safetensors", "metis_tse/metis_tse.safetensors"}  # the other variant was converted
    gone |= {path for path in first if "metis_vc_lora" in path}
    assert first.keys() - second.keys() == gone
    for path, state in second.items():
        above = ("encoder.layers.3.", "encoder.layers.4.")
        upper = {key for key in first[path] if path.startswith("w2v") and key.startswith(above)}
        same(state, {key: value for key, value in first[path].items() if key not in upper})
        if not upper:
            assert (back / path).read_bytes() == (folder / path).read_bytes(), path
    same(torch.load(back / "metis_l2s" / "vis_model.pth"), held["visual"])
    assert (back / "vocab.json").read_bytes() == (folder / "vocab.json").read_bytes()
    assert Released(back).config == replace(TINY, name="back")
    assert all(row["status"] != "wrong" for row in convert.verify(Released(back)))
    again = tmp_path / "again"
    convert.to_own(back, again)
    assert tensors(again).keys() == tensors(own).keys()
    for path, state in tensors(again).items():
        same(state, tensors(own)[path])


def test_conversion_of_one_task_in_another_dtype(place, tmp_path, capsys):
    own = tmp_path / "own"
    command = ["checkpoint", "convert", str(place[0]), str(own), "--to=own", "--task", "vc", "--variant=lora"]
    assert cli.main([*command, "--dtype=bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(own), "layout": "own"}
    assert [path.name for path in (own / "tasks").iterdir()] == ["vc"] and not (own / "lips").exists()
    assert {value.dtype for value in load_file(own / "tasks" / "vc" / "model.safetensors").values()} == {torch.bfloat16}
    assert {value.dtype for value in load_file(own / "ssl" / "stats.safetensors").values()} == {torch.float32}
    assert cli.main(command) == 2 and "exists already" in capsys.readouterr().err
    assert cli.main(["checkpoint", "convert", str(own), str(tmp_path / "back"), "--to=released"]) == 0
    assert Released(tmp_path / "back").tasks == ("vc",)


def test_a_conversion_that_fails_leaves_nothing(copy, tmp_path):
    spoil(Released(copy).find("stage2_full"), drop("token_emb.11.weight"))
    with pytest.raises(MetisError, match="token_emb"):
        convert.to_own(copy, tmp_path / "own")
    assert not [path for path in tmp_path.iterdir() if "own" in path.name]


def test_what_has_no_released_form(tmp_path, place, capsys):
    assert cli.main(["checkpoint", "convert", "nano", str(tmp_path / "out"), "--to=released"]) == 2
    assert "mel encoder" in capsys.readouterr().err and not (tmp_path / "out").exists()
    own = tmp_path / "own"
    convert.to_own(place[0], own, tasks=["se"])
    _, state = Released(place[0]).task("se")
    save_part(own / "tasks" / "tts", state, TaskConfig("tts", {"use_phones": True}, 32))
    adapter = {key: value for key, value in state.items() if ".lora_" not in key}
    save_part(own / "tasks" / "vc", adapter, TaskConfig("vc", GATED), {"mode": "adapter"})
    for task in ("tts", "vc"):
        with pytest.raises(MetisError, match=f"the task {task} .*has no released form"):
            convert.to_released(own, tmp_path / "out", tasks=[task])
    convert.to_released(own, tmp_path / "out", tasks=["se"])


def test_export_of_a_fine_tuned_task(place, tmp_path, capsys):
    own = tmp_path / "own"
    convert.to_own(place[0], own, tasks=["se"])
    config, state = Released(place[0]).task("se")
    card = {"data": "my recordings", "licence": "mine", "scores": {"steps": 12, "with_condition": 1.5}}
    save_part(own / "tasks" / "se", state, config, card, dtype=torch.float32)
    out = tmp_path / "export"
    assert cli.main(["checkpoint", "export", str(own), str(out), "--task=se"]) == 0
    printed = capsys.readouterr().out.split()
    assert [Path(path).name for path in printed] == [
        "README.md", "metis_se_lora_32.safetensors", "metis_se_lora_32_adapter.safetensors",
    ]  # fmt: skip
    for name in ("metis_se_lora_32", "metis_se_lora_32_adapter"):
        same(load_file(out / "metis_se" / f"{name}.safetensors"), place[1][f"metis_se/{name}"])
    readme = (out / "README.md").read_text()
    for words in ("my recordings", "Licence: mine", "Steps: 12", "with_condition | 1.5", "rank 32 (alpha 64)"):
        assert words in readme
    assert cli.main(["checkpoint", "export", str(own), str(out), "--task=se"]) == 2
    assert cli.main(["checkpoint", "export", str(own), str(tmp_path / "more"), "--task=vc"]) == 2
    assert not (tmp_path / "more").exists()
    assert cli.main(["checkpoint", "export", "nano", str(tmp_path / "tts"), "--task=tts"]) == 0


def test_verify_prints_a_table(place, copy, capsys):
    assert cli.main(["checkpoint", "verify", str(place[0])]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" ok ") == len(FILES) + 2 and "CC BY-NC" in printed
    spoil(Released(copy).find("base"), drop("to_logit.bias"))
    (copy / "semantic_codec" / "model.safetensors").unlink()
    assert cli.main(["checkpoint", "verify", str(copy), "--json"]) == 1
    rows = {row["file"]: row for row in json.loads(capsys.readouterr().out)["files"]}
    assert rows["base"]["status"] == "wrong" and rows["semantic"]["status"] == "absent"
    assert cli.main(["checkpoint", "verify", str(copy), "--task=se", "--variant=full"]) == 0
    assert cli.main(["checkpoint", "verify", str(copy), "--task=vc", "--variant=full"]) == 1
    assert "missing" in capsys.readouterr().out
    assert cli.main(["checkpoint", "verify", str(copy.parent)]) == 2
    assert "no released files" in capsys.readouterr().err


def test_verify_knows_published_sizes(copy, monkeypatch):
    monkeypatch.setattr(Released, "published", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr(convert, "TABLES", {})
    rows = {row["file"]: row for row in convert.verify(Released(copy))}
    assert rows["vc_full"]["status"] == "wrong" and "2966748564" in rows["vc_full"]["note"]
    assert rows["base"]["status"] == "ok" and "2903802792" in rows["base"]["note"]


def test_inspect_and_sizes(place, capsys):
    assert cli.main(["checkpoint", "inspect", str(place[0]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    kinds = {part["file"]: part["type"] for part in document["parts"]}
    assert kinds["t2s_model/model.safetensors"] == "released tts_full" and len(kinds) == len(FILES) - 1
    assert kinds["w2v-bert-2.0/model.safetensors"] == "released ssl"
    assert cli.main(["checkpoint", "sizes", "--preset=nano"]) == 0
    assert "stage2_full" in capsys.readouterr().out


def test_own_states_survive_in_bf16(place, tmp_path):
    """Own folders keep names: LoRA under the released ones, the rest under ours."""
    convert.to_own(place[0], tmp_path / "own", tasks=["tse"])
    state = load_state(tmp_path / "own" / "tasks" / "tse")
    assert "cond_adapter.gate_scale" in state and LORA in state


def test_a_variant_is_one_of_a_task(place):
    from metis_lib.pipeline import Metis

    with pytest.raises(MetisError, match="which task"):
        Metis.from_pretrained(place[0], variant="full", device="cpu")


def test_export_of_a_task_of_ones_own(tmp_path):
    from metis_lib.models.stage1 import Stage1

    config = TINY.stage1
    save_part(tmp_path / "own" / "tasks" / "declip", Stage1(config), TaskConfig("declip", {}), dtype=torch.float32)
    with convert.fresh(tmp_path / "out") as folder:
        convert._task_files(tmp_path / "own", "declip", folder)
    assert [p.name for p in (tmp_path / "out").rglob("*.safetensors")] == ["metis_declip.safetensors"]


def test_a_connection_that_breaks_is_one_line(place, hub, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    def broken(*_, **__):
        raise HTTPError("connection reset by peer")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(MetisError, match="connection reset") as caught:
        Released("amphion/metis").path("base")
    assert "\n" not in str(caught.value)
