"""Light-PEFT's masks, scores, choices and pruned model against the authors' functions."""

import pytest
import torch
from torch.nn import functional as F

import tunesmith as ts
from tunesmith.engine.model import adapters
from tunesmith.methods.method import parse
from tunesmith.pruning import prunable
from tunesmith.schedule.light_peft import MASKS, LightPEFT, cut, rank_scores

from .cases import names, read

CASES = {name: read("light-peft", name) for name in names("light-peft")}


def net(case):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    more = {"pad_token_id": case.config["pad_token_id"], "layer_norm_eps": case.config["layer_norm_eps"], "type_vocab_size": len(case.tensors["frozen.roberta.embeddings.token_type_embeddings.weight"])}
    model = RobertaForSequenceClassification(RobertaConfig(**case.config["model_config"], **more, **dropout))
    model.load_state_dict(case.part("frozen"))
    return model.train()


def method(case):
    config = case.config
    if config["adapter"] == "lora":
        return ts.LoRA(rank=config["r"], alpha=config["lora_alpha"], targets=config["target_modules_suffix"])
    return ts.SeriesAdapter(bottleneck=config["r"], activation="relu", place="after", targets=config["target_modules_suffix"])


def own_names(config):
    return {"A": "down", "B": "up"} if config["adapter"] == "lora" else {"down": "down", "up": "up"}


@pytest.mark.parametrize("name", list(CASES))
def test_estimate_and_cut(name):
    case = CASES[name]
    config, close = case.config, {"atol": case.tolerance, "rtol": case.tolerance}
    light = LightPEFT(heads=config["attn_pruning_ratio"], channels=config["ffn_pruning_ratio"], modules=config["module_pruning_ratio"], ranks=config["rank_pruning_ratio"], l1=config["l1_loss_coef"], official=True)
    assert (config["attn_pruning_method"], config["ffn_pruning_method"], config["peft_pruning_method"]) == ("layerwise", "global", "global")
    model = ts.adapt(net(case), method(case))
    own = adapters(model, "default")
    with torch.no_grad():
        for path, adapter in own.items():
            for mine, theirs in own_names(config).items():
                getattr(adapter, mine).copy_(case.tensors[f"param.{path}.{theirs}"])
    light.prepare(model)
    masks, blocks = adapters(model, MASKS), prunable(model)
    layers = {kind: [path for path, c in blocks.items() if c.kind == kind] for kind in ("heads", "channels")}
    with torch.no_grad():
        for kind, key in (("heads", "attn_mask"), ("channels", "ffn_mask")):
            for path, values in zip(layers[kind], case.tensors[f"param.{key}"], strict=True):
                masks[path].m.copy_(values)
    stage = ts.stages(model, 1, light).parts["selection"]
    inputs = case.part("in")
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    ce = F.cross_entropy(logits, inputs["labels"])
    loss = ce + ts.auxiliary_loss(model)
    loss.backward()
    torch.testing.assert_close(logits, case.tensors["out.logits_masked"], **close)
    torch.testing.assert_close(ce, case.tensors["out.ce"], **close)
    torch.testing.assert_close(loss, case.tensors["out.loss"], **close)
    for kind, key in (("heads", "attn_mask"), ("channels", "ffn_mask")):
        torch.testing.assert_close(torch.stack([masks[path].m.grad for path in layers[kind]]), case.tensors[f"grad.{key}"], **close)
    for path, adapter in own.items():
        torch.testing.assert_close(rank_scores(adapter), case.tensors[f"out.rank_importance.{path}"], **close)
    stage.before_step(None)
    for path in own:
        torch.testing.assert_close(stage.sums[path] / stage.counts[path], case.tensors[f"out.ratio.{path}"], **close)

    chosen = stage.plan(stage.ratio())
    for kind, key in (("heads", "keep_heads"), ("channels", "keep_ffn")):
        for layer, path in enumerate(layers[kind]):
            assert chosen.units[path] == case.tensors[f"out.{key}.{layer}"].tolist()
    assert {path: len(ranks) for path, ranks in chosen.ranks.items()} == config["kept_rank_per_module"]
    assert len(chosen.ranks) == sum(key.startswith("out.pruned.") for key in case.tensors) / 2
    small = ts.prune(net(case), chosen.units)
    sites = {path: method(case).resized(len(ranks)).dump() for path, ranks in chosen.ranks.items()}
    ts.adapt(small, parse(method(case).model_copy(update={"targets": sites})))
    for path, adapter in adapters(small, "default").items():
        found = cut(own[path], path, chosen, blocks)
        for mine, theirs in own_names(config).items():
            assert torch.equal(found[mine], case.tensors[f"out.pruned.{path}.{theirs}"])
            getattr(adapter, mine).data.copy_(found[mine])
    torch.testing.assert_close(small(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits, case.tensors["out.logits_pruned"], **close)
