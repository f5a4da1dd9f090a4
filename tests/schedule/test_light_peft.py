"""Light-PEFT: what a first stage decides, and models that are smaller afterwards, on disk too."""

import json
import shutil
import signal

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.train import test_resume as resume
from tunesmith.engine import store
from tunesmith.engine.model import adapters, record_of
from tunesmith.errors import TunesmithError
from tunesmith.lifecycle.export import merge_to_folder
from tunesmith.methods.select import mlp_outputs
from tunesmith.pruning import prunable, restore, save
from tunesmith.schedule.light_peft import MASKS, LightPEFT, kept, parse_prune, plan
from tunesmith.train import recipe as recipes
from tunesmith.train.folder import open_run
from tunesmith.train.loop import run

KINDS = ("bert", "llama", "gpt2", "vit")


def logits(model, kind):
    with torch.no_grad():
        return model.eval()(**tiny.batch(kind)).logits


def some(model):
    """Half of the units of each block, unlike in each."""
    generator = torch.Generator().manual_seed(0)
    return {path: torch.randperm(c.units, generator=generator)[: c.units // 2].sort().values.tolist() for path, c in prunable(model).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_units_whose_mask_is_zero_changes_nothing(kind):
    model, keep = tiny.BUILDERS[kind](), some(tiny.BUILDERS[kind]())
    assert len(keep) == 4
    before = sum(p.numel() for p in model.parameters())
    masked = ts.adapt(tiny.BUILDERS[kind](), {"method": "mask-tuning"})
    with torch.no_grad():
        for path, a in adapters(masked, "default").items():
            a.m.zero_()[keep[path]] = 1
    small = ts.prune(model, keep)
    torch.testing.assert_close(logits(small, kind), logits(masked, kind), atol=1e-6, rtol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.85 * before
    if kind in ("llama", "gpt2"):
        ids = tiny.batch(kind)["input_ids"][1:]
        assert small.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 14)


def test_pruning_twice_counts_in_the_units_of_the_whole_model():
    once, twice = tiny.tiny_bert(), tiny.tiny_bert()
    path = next(p for p, c in prunable(once).items() if c.kind == "channels")
    ts.prune(once, {path: [1, 5, 9]})
    ts.prune(ts.prune(twice, {path: [0, 1, 5, 7, 9]}), {path: [1, 2, 4]})
    assert once._tunesmith_pruned == twice._tunesmith_pruned
    assert torch.equal(logits(once, "bert"), logits(twice, "bert"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_is_pruned_again_saved_and_read(tmp_path, kind):
    """Also where as many channels are left as the residual has numbers."""
    model = tiny.BUILDERS[kind]()
    blocks = prunable(model)
    keep = {path: list(range(32)) if c.kind == "channels" else list(range(c.units // 2)) for path, c in blocks.items()}
    ts.prune(model, keep)
    again = prunable(model)
    assert {p: [s.path for s in c.inner] for p, c in again.items()} == {p: [s.path for s in c.inner] for p, c in blocks.items()}
    assert {p: c.units for p, c in again.items()} == {p: len(units) for p, units in keep.items()}
    assert [s.path for s in mlp_outputs(model)] == [p for p, c in blocks.items() if c.kind == "channels"]
    save(model, tmp_path, "whole")
    read = restore(type(model).from_pretrained(tmp_path).eval(), tmp_path)
    assert torch.equal(logits(read, kind), logits(model, kind))
    first = {p: ts.prune(model, {p: [0]}) for p in again}
    assert first and torch.isfinite(logits(model, kind)).all() and {c.units for c in prunable(model).values()} == {1}
    with pytest.raises(TunesmithError, match="the peft format knows no pruned models"):
        ts.save(ts.adapt(model, "lora"), tmp_path / "a", format="peft")


def test_choices():
    scores = torch.tensor([0.3, 0.1, 0.3, 0.2])
    assert kept(scores, 0.5).tolist() == [True, False, True, False]
    assert kept(torch.ones(4), 0.5).tolist() == [False, False, True, True] and kept(torch.ones(4), 0.5, official=True).sum() == 1
    assert kept(torch.arange(12.0), 1 / 3).sum() == 8 and kept(torch.arange(3.0), 1 / 3).sum() == 2
    masks = {"a": torch.ones(2), "b": torch.tensor([0.1, 0.2, 0.3]), "c": torch.ones(3)}
    config = LightPEFT(heads=0.99, channels=0.5, modules=0.5, ranks=0.5)
    found = plan(config, masks, {"a"}, {"x": torch.tensor(1.0), "y": torch.tensor(2.0)}, {"x": torch.ones(4), "y": torch.tensor([0.0, 0, 5, 6])})
    assert found.units == {"a": [1], "b": [2], "c": [0, 1, 2]}  # every block keeps a unit
    assert found.ranks == {"y": [2, 3]}


def test_an_adapter_of_a_pruned_model_comes_back_on_one_and_on_no_other(tmp_path):
    keep = some(tiny.tiny_llama())
    model = ts.adapt(ts.prune(tiny.tiny_llama(), keep), {"method": "lora", "rank": 2})
    for a in adapters(model, "default").values():
        nn.init.normal_(a.B)
    ts.save(model, tmp_path / "a")
    again = ts.load(ts.prune(tiny.tiny_llama(), tmp_path / "a"), tmp_path / "a")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    with pytest.raises(TunesmithError, match=r"without some heads and channels; call prune\(model, folder\) first"):
        ts.load(tiny.tiny_llama(), tmp_path / "a")
    ts.save(ts.adapt(tiny.tiny_llama(), "lora"), tmp_path / "b")
    with pytest.raises(TunesmithError, match="not for one that was pruned"):
        ts.load(ts.prune(tiny.tiny_llama(), keep), tmp_path / "b")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"bert.encoder.layer.0.output.dens": [0]}, "did you mean 'bert.encoder.layer.0.output.dense'"),
        ({"bert.encoder.layer.0.output.dense": []}, "reads 64 channels; what is kept are numbers from 0 to 63"),
        ({"bert.encoder.layer.0.output.dense": [0, 64]}, "reads 64 channels"),
        ({"bert.encoder.layer.0.attention.output.dense": [1, 0]}, "reads 4 heads"),
    ],
)
def test_bad_units_are_named(keep, message):
    model = tiny.tiny_bert()
    with pytest.raises(TunesmithError, match=message):
        ts.prune(model, {"bert.encoder.layer.1.output.dense": [0, 1]} | keep)
    assert model.bert.encoder.layer[1].output.dense.in_features == 64
    with pytest.raises(TunesmithError, match="has adapters"):
        ts.prune(ts.adapt(model, "lora"), keep)


def test_bad_options_are_named():
    for value, message in (("light", "did you mean 'light-peft'"), ({"prune": "light-peft", "head": 0.5}, "no field 'head'"), ({"prune": "light-peft", "heads": 1}, "heads=1")):
        with pytest.raises(TunesmithError, match=message):
            parse_prune(value)
    with pytest.raises(TunesmithError, match="no heads or channels"):
        LightPEFT().prepare(ts.adapt(tiny.tiny_convnet(), {"method": "lora", "targets": ["8"]}))


def test_scores_wait_for_the_second_half_and_go_on_from_their_state():
    def begun():
        torch.manual_seed(0)
        model = ts.adapt(tiny.tiny_bert(), {"method": "lora", "rank": 2})
        light = LightPEFT(l1=1e-3)
        light.prepare(model)
        return model.train(), ts.stages(model, 6, light)

    def go(model, stages, steps):
        optimizer = torch.optim.Adam(ts.trainable(model).values(), lr=1e-2)
        for _ in range(steps):
            (model(**tiny.batch("bert"), labels=torch.tensor([0, 1, 2])).loss + ts.auxiliary_loss(model)).backward()
            stages.before_step(optimizer)
            optimizer.step()
            stages.step()
            optimizer.zero_grad()

    model, stages = begun()
    go(model, stages, 3)
    stage = stages.parts["selection"]
    assert not any(stage.counts.values()) and not stage.scores
    go(model, stages, 2)
    assert set(stage.counts.values()) == {2} and stage.scores.keys() == stage.own.keys() and MASKS not in stage.own
    other, others = begun()
    others.load_state_dict(stages.state_dict())
    for name, p in ts.trainable(other).items():
        p.data.copy_(ts.trainable(model)[name].data)
    assert others.parts["selection"].plan(others.parts["selection"].ratio()) == stage.plan(stage.ratio())


def recipe(models, data, kind="bert", source="tickets", **more):
    values = {"model": models[kind], "data": data[source], "epochs": 2, "batch_size": 4, "lr": 0.01, "eval_every": 8, "max_new_tokens": 2, "output": "run"}
    return recipes.check(values | {"prune": {"prune": "light-peft", "steps": 6, "heads": 0.5, "channels": 0.5}} | more)


@pytest.mark.parametrize(
    ("kind", "source", "method"),
    [("bert", "tickets", {"method": "lora", "rank": 4}), ("llama", "sums", {"method": "series-adapter", "bottleneck": 4}), ("llama", "sums", "ia3"), ("gpt2", "sums", {"method": "pissa", "rank": 4})],
)
def test_a_run_is_smaller_and_merges_into_a_folder(here, models, data, kind, source, method):
    result = run(recipe(models, data, kind, source, method=method))
    first = json.loads((here / "run-estimate" / "pruned" / "pruning.json").read_text())
    model = open_run("run").model
    layers = [c for c in prunable(model).values()]
    assert {len(first["units"][path]) for path in prunable(model)} >= {2 if kind != "llama" else 1} and len(layers) == 4
    whole = open_run("run", adapter=False).model
    assert sum(p.numel() for p in whole.parameters()) > sum(p.numel() for n, p in model.named_parameters() if ".tunesmith." not in f".{n}")
    if method != "ia3":
        assert 0 < len(first["sites"]) == len(first["ranks"]) <= len(first["ratio"]) - int(0.75 * len(first["ratio"]))
        assert {path: c.rank if hasattr(c, "rank") else c.bottleneck for path, c in record_of(model, "default").sites.items()} == {p: len(r) for p, r in first["ranks"].items()}
    assert result.summary["steps"] > 0
    if method != {"method": "series-adapter", "bottleneck": 4}:
        merged = merge_to_folder("run", here / "merged")
        assert merged["max_error"] < 1e-5
        assert (here / "merged" / "pruned.json").exists()


def test_a_pruned_folder_trains_and_is_pruned_again(here, models, data):
    run(recipe(models, data))
    merge_to_folder("run", here / "small")
    again = {"model": str(here / "small"), "epochs": 1}
    run(recipe(models, data, **again, prune=None, output="plain"))
    run(recipe(models, data, **again, output="smaller"))
    sizes = [sum(c.units for c in prunable(open_run(name).model).values()) for name in ("run", "plain", "smaller")]
    assert sizes[0] == sizes[1] > sizes[2]
    with pytest.raises(TunesmithError, match="has lost units"):
        ts.prune(ts.prune(tiny.tiny_bert(), {"bert.encoder.layer.0.output.dense": [0]}), here / "run" / "adapter")


def test_a_second_stage_begins_where_the_first_ended(here, models, data):
    run(recipe(models, data, method={"method": "lora", "rank": 4}, max_steps=1, lr=1e-12))
    first = store.read_tensors(here / "run-estimate" / "pruned" / "start.safetensors")
    last = store.read_tensors(here / "run" / "adapter" / "adapter.safetensors")
    assert first.keys() == last.keys() and all(torch.allclose(first[key], last[key], atol=1e-6) for key in first)


def test_what_has_no_ranks_to_cut_starts_again(here, models, data):
    run(recipe(models, data, method={"method": "dora", "rank": 2}, max_steps=1))
    first = store.read_tensors(here / "run-estimate" / "pruned" / "start.safetensors")
    assert first and all(key.startswith("classifier") for key in first)


@pytest.mark.parametrize("method", ["adalora", "vera", "parallel-adapter"])
def test_methods_without_ranks_to_cut_go_through_both_stages(here, models, data, method):
    assert run(recipe(models, data, method=method, max_steps=1)).summary["method"] == method


def test_beside_ranks_that_are_cut_other_methods_keep_their_layers(here, models, data):
    run(recipe(models, data, method={"method": "lora", "rank": 4, "targets": {"query": {}, "value": {}, "LayerNorm": {"method": "ln-tuning"}}}, max_steps=1))
    first, sites = open_run("run-estimate").model, record_of(open_run("run").model, "default").sites
    norms = [path for path, config in record_of(first, "default").sites.items() if config.method == "ln-tuning"]
    assert norms and set(norms) < set(sites) and {config.method for config in sites.values()} == {"lora", "ln-tuning"}


def test_a_first_stage_on_other_data_is_not_taken_over(here, models, data):
    mine = here / "mine.csv"
    mine.write_text(text := open(data["tickets"]).read())
    run(recipe(models, {"tickets": str(mine)}))
    shutil.rmtree("run")
    mine.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(TunesmithError, match="run-estimate cannot go on: the data in .*mine.csv have changed"):
        run(recipe(models, {"tickets": str(mine)}))


def test_padding_has_no_part_in_a_language_models_ratios():
    found = []
    for pads in (0, 24):
        torch.manual_seed(0)
        model = ts.adapt(tiny.tiny_llama(), {"method": "lora", "rank": 2})
        with torch.no_grad():
            for p in ts.trainable(model).values():
                p.copy_(torch.randn_like(p))
        light = LightPEFT()
        light.prepare(model)
        stage = ts.stages(model.train(), 1, light).parts["selection"]
        ids = torch.cat([torch.arange(3, 11), torch.zeros(pads, dtype=torch.long)])[None]
        mask = torch.tensor([[1] * 8 + [0] * pads])
        ts.causal_lm_loss(model, ids, ids.masked_fill(mask == 0, -100), mask)
        found.append({path: float(stage.sums[path]) / stage.counts[path] for path in stage.own})
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_what_cannot_be_combined_is_refused(here, models, data):
    with pytest.raises(TunesmithError, match="leave one of them out"):
        run(recipe(models, data, selection="ist"))
    assert not (here / "run").exists() and not (here / "run-estimate").exists()


def test_a_run_killed_in_either_stage_ends_in_the_same_bits(here, models, data):
    values = {"model": models["bert"], "data": data["tickets"], "method": {"method": "lora", "rank": 4, "dropout": 0.1}, "epochs": 3, "batch_size": 4, "lr": 0.01, "checkpoint_every": 4}
    values["prune"] = {"prune": "light-peft", "steps": 8}
    resume.finished(values | {"output": "whole"})
    for last in (6, 14):  # of the first stage, of the second
        child = resume.in_process(values | {"output": "cut"}, True, last=last)
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
    assert json.loads((here / "cut-estimate" / "summary.json").read_text())["steps"] == 8
    resume.finished(values | {"output": "cut"}, True)
    resume.same(resume.outcome(here / "cut"), resume.outcome(here / "whole"))


def test_two_processes_cut_one_model(here, models, data):
    values = {"model": models["bert"], "data": data["tickets"], "epochs": 1, "batch_size": 4, "lr": 0.01, "output": "run", "prune": {"prune": "light-peft", "steps": 4}}
    resume.in_two_processes(values)
    assert len(store.read_json(here / "run" / "adapter" / "adapter.json")["pruned"]) == 4
    run(recipes.check(values | {"output": "alone", "accumulate": 2}))
    two, one = (store.read_json(here / f"{name}-estimate" / "pruned" / "pruning.json")["ratio"] for name in ("run", "alone"))
    assert two == pytest.approx(one, rel=1e-3)
