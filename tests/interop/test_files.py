"""Adapter files from anywhere: each gives a right adapter or one clear sentence, and then the model is as it was."""

import copy
import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith.engine.store import checksum

FORMATS = {"tunesmith": ("adapter.json", "adapter.safetensors"), "peft": ("adapter_config.json", "adapter_model.safetensors")}
IDS = torch.tensor([[5, 6, 7, 8]])
FUZZ = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def base(scale=1.0):
    model = tiny.tiny_llama(layers=1, hidden=8)
    if scale != 1:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(scale)
    return model


METHODS = {
    "lora": ts.LoRA(rank=2, targets={"q_proj": {}, "mlp.up_proj": {"rank": 1, "alpha": 4}}, modules_to_save=["norm"]),
    "dora": ts.DoRA(rank=2, targets="q_proj"),
    "ia3": ts.IA3(),
    "ln-tuning": ts.LNTuning(),
    "prompt-tuning": ts.PromptTuning(tokens=2),
    "prefix-tuning": ts.PrefixTuning(tokens=2),
}


class Saved(dict):
    def __repr__(self):
        return "saved"  # hypothesis prints it


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(contents of the folder, logits) for each method and format."""
    found = Saved()
    for method, config in METHODS.items():
        model = ts.adapt(base(), config)
        with torch.no_grad():
            for p in ts.trainable(model).values():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
            logits = model(IDS).logits
        for format in FORMATS:
            folder = tmp_path_factory.mktemp("a")
            ts.save(model, folder, format=format)
            found[method, format] = {p.name: p.read_bytes() for p in folder.iterdir()}, logits
    return found


def facts(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [type(m) for m in model.modules()],
        {k: p.requires_grad for k, p in model.named_parameters()},
        set(vars(model)),
    )


def write(folder, contents):
    folder.mkdir(exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def outcome(folder, **options):
    """The logits of a load, or the sentence that refused it, after which nothing has changed."""
    model = base()
    before = facts(model)
    try:
        ts.load(model, folder, **options)
    except ts.TunesmithError as error:
        state, *rest = facts(model)
        assert rest == list(before[1:]) and state.keys() == before[0].keys() and all(torch.equal(state[k], before[0][k]) for k in state)
        assert "\n" not in str(error) and len(str(error)) > 10, str(error)
        return str(error)
    with torch.no_grad():
        return model(IDS).logits


cases = pytest.mark.parametrize("method,format", [(m, f) for m in METHODS for f in FORMATS])


@cases
def test_as_it_is(saved, method, format, tmp_path):
    contents, logits = saved[method, format]
    assert torch.allclose(outcome(write(tmp_path / "a", contents)), logits, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=100, **FUZZ)
@given(method=st.sampled_from(list(METHODS)), which=st.integers(0, 1), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_flipped_bits(saved, format, method, which, where, bit, tmp_path):
    contents, logits = saved[method, format]
    name = FORMATS[format][which]
    data = bytearray(contents[name])
    data[int(where * len(data))] ^= 1 << bit
    result = outcome(write(tmp_path / "f", contents | {name: bytes(data)}))
    if format == "tunesmith":
        assert isinstance(result, str) or torch.equal(result, logits)


@cases
def test_truncated(saved, method, format, tmp_path):
    contents, _ = saved[method, format]
    for name in FORMATS[format]:
        for keep in (0, 1, 7, 8, 9, len(contents[name]) // 2, len(contents[name]) - 2):
            assert isinstance(outcome(write(tmp_path / "a", contents | {name: contents[name][:keep]})), str)
        left = {k: v for k, v in contents.items() if k != name}
        assert isinstance(outcome(write(tmp_path / name, left)), str)


ABSURD = [
    None, True, -1, 0, 1, 10**6, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../../etc/passwd", "/etc/passwd", "a\x00b", "(((", "(a{99999}){99999}", ".*",
    [], [[]], {}, {"a": {"b": {}}}, ["../.."] * 3, [None], [1, "q_proj"], {"method": "lora"}, {"method": "../x"}, ["x" * 5000], "all-linear", "tokens",
]  # fmt: skip


def places(tree, here=()):
    yield here
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*here, key))


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=150, **FUZZ)
@given(data=st.data(), method=st.sampled_from(list(METHODS)))
def test_absurd_values(saved, format, data, method, tmp_path):
    contents, logits = saved[method, format]
    name = FORMATS[format][0]
    card = json.loads(contents[name])
    *path, last = data.draw(st.sampled_from([p for p in places(card) if p and p[0] != "checksum"]), "place")
    inner = card
    for key in path:
        inner = inner[key]
    action = data.draw(st.sampled_from(["set", "set", "set", "delete", "rename"]), "action")
    before = copy.deepcopy(inner[last])
    if action == "set":
        inner[last] = data.draw(st.sampled_from(ABSURD), "value")
    else:
        del inner[last]
        if action == "rename" and isinstance(inner, dict):
            inner[data.draw(st.sampled_from(["../x", "model.layers.9.q", "model", "", "q" * 5000]), "key")] = before
    if format == "tunesmith":
        card["checksum"] = checksum(card)  # as someone would who means harm
    outcome(write(tmp_path / "f", contents | {name: json.dumps(card).encode()}))


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"a": ' * 50_000, "null", "[]", "\xff\xfe", "{} {}", "NaN"])
@pytest.mark.parametrize("format", FORMATS)
def test_json_that_is_none(saved, format, text, tmp_path):
    contents, _ = saved["lora", format]
    assert isinstance(outcome(write(tmp_path / "a", contents | {FORMATS[format][0]: text.encode("latin1")})), str)


def changed(contents, format, change):
    """The folder with other tensors, and a card that vouches for them."""
    card, weights = FORMATS[format]
    tensors = load(contents[weights])
    change(tensors)
    data = save(tensors, metadata={"format": "pt"})
    new = contents | {weights: data}
    if format == "tunesmith":
        import hashlib

        fields = json.loads(contents[card]) | {"sha256": hashlib.sha256(data).hexdigest()}
        new[card] = json.dumps(fields | {"checksum": checksum(fields)}).encode()
    return new


@cases
def test_keys_and_shapes_that_do_not_fit_are_named(saved, method, format, tmp_path):
    contents, _ = saved[method, format]
    key = sorted(load(contents[FORMATS[format][1]]))[-1]

    def drop(t):
        del t[key]

    def extra(t):
        t["model.layers.0.self_attn.q_proj.tail"] = torch.ones(2)

    def rename(t):
        t[key + "x"] = t.pop(key)

    def longer(t):
        t[key] = torch.cat([t[key], t[key]], -1) if t[key].dim() else t[key][None]

    def scalar(t):
        t[key] = torch.tensor(1.0)

    def none(t):
        t[key] = t[key][:0]

    def whole(t):
        t[key] = t[key].int()

    for i, change in enumerate((drop, extra, rename, longer, scalar, none, whole, dict.clear)):
        message = outcome(write(tmp_path / str(i), changed(contents, format, change)))
        assert isinstance(message, str), change.__name__
        if change is extra:
            assert "q_proj.tail" in message


def test_another_base_is_refused_and_can_be_forced(saved, tmp_path):
    contents, logits = saved["lora", "tunesmith"]
    folder = write(tmp_path / "a", contents)
    with pytest.raises(ts.TunesmithError, match="trained on other weights of LlamaForCausalLM.*or force it"):
        ts.load(base(scale=2.0), folder)
    assert ts.trainable(ts.load(base(scale=2.0), folder, force=True))
    with pytest.raises(ts.TunesmithError, match="another base"):
        ts.load(tiny.tiny_llama(layers=2, hidden=8), folder)
    with pytest.raises(ts.TunesmithError, match="another base"):
        ts.load(nn.Linear(4, 4), folder)
    with pytest.raises(ts.TunesmithError, match="is not a layer"):
        ts.load(nn.Linear(4, 4), write(tmp_path / "p", saved["lora", "peft"][0]))
    torch.testing.assert_close(ts.load(base().bfloat16().float(), folder)(IDS).logits, logits, atol=0.1, rtol=0)  # rounded, but the same base


@pytest.mark.parametrize("name", ["default", "train", "keys", "a.b", "", "../up", "a b", "ä", 3])
@pytest.mark.parametrize("format", FORMATS)
def test_names_that_are_taken_or_impossible(saved, name, format, tmp_path):
    folder = write(tmp_path / "a", saved["lora", format][0])
    model = ts.load(base(), folder)
    before = model(IDS).logits
    if name == "":
        name = "default"
    with pytest.raises(ts.TunesmithError, match="name"):
        ts.load(model, folder, name=name)
    assert torch.equal(model(IDS).logits, before)
    ts.load(model, folder, name="another")
    assert torch.equal(model(IDS).logits, before)


def test_pickles_are_not_opened(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    contents, _ = saved["lora", "peft"]
    folder = write(tmp_path / "a", {"adapter_config.json": contents["adapter_config.json"]})
    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    assert "pickles can run code" in outcome(folder)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    assert "damaged" in outcome(folder)
    assert not (tmp_path / "opened").exists()


def test_folders_that_hold_no_adapter(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "odd" / "adapter.json").mkdir(parents=True)
    for name in ("empty", "file", "odd", "none"):
        assert isinstance(outcome(tmp_path / name), str)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_the_old_folder(format, tmp_path):
    model = ts.adapt(base(), ts.LoRA(rank=4))
    ts.save(model, tmp_path / "a", format=format)
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with torch.no_grad():
        next(iter(ts.trainable(model).values())).add_(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))  # any write beyond 512 bytes fails
    try:
        with pytest.raises(ts.TunesmithError, match="cannot write"):
            ts.save(model, tmp_path / "a", format=format)
        with pytest.raises(ts.TunesmithError, match="cannot write"):
            ts.save(model, tmp_path / "b", format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_fails_late_leaves_the_old_folder(call, tmp_path, monkeypatch):
    model = ts.adapt(base(), "lora")
    ts.save(model, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}

    def fails(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync" if call == "fsync" else "pathlib.Path.rename", fails)
        with pytest.raises(ts.TunesmithError, match="No space left on device"):
            ts.save(model, tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_huge_rank_takes_no_memory(saved, tmp_path):
    contents, _ = saved["lora", "tunesmith"]
    card = json.loads(contents["adapter.json"])
    card["method"]["rank"] = 65536
    card["checksum"] = checksum(card)
    assert "does not hold what its card says" in outcome(write(tmp_path / "a", contents | {"adapter.json": json.dumps(card).encode()}))


def test_files_are_what_they_say(saved, tmp_path):
    """The card lists each tensor's dtype and shape, and nothing else is in the file."""
    folder = write(tmp_path / "a", saved["lora", "tunesmith"][0])
    card, tensors = json.loads((folder / "adapter.json").read_text()), load_file(folder / "adapter.safetensors")
    assert card["tensors"] == {k: [str(t.dtype).removeprefix("torch."), *t.shape] for k, t in tensors.items()}
    save_file(tensors, folder / "adapter.safetensors")  # the same tensors without the header's metadata are another file
    assert "checksum" in outcome(folder)
