"""Training a model's own parameters: all of them, the head, the biases, or the norms. The base keeps its values."""

from typing import ClassVar

from ..engine.sites import Site, Targets, find, head_paths, sites, within
from ..errors import TunesmithError
from .method import Method, values_of
from .peft_targets import check_paths


class Full(Method):
    """Full fine-tuning: every parameter trains, in a copy, so that the base can be had back bit for bit."""

    method, family, title, paper = "full", "selective", "Full fine-tuning", "none"
    works_on = ("linear", "embedding", "conv", "attention", "norm", "other")
    default_lr = 5e-5

    targets: Targets = "default"

    def names(self, site: Site) -> tuple[str, ...]:
        """The parameters that train at a site."""
        return site.names

    def default(self, model):
        return sites(model)

    def select(self, model):
        skip = self.saved_paths(model)
        if self.targets == "default":
            found = [(s, {}) for s in self.default(model) if not within(s.path, skip)]
        else:
            found = find(model, self.targets, self.works_on, self.method, skip).values()
        chosen = {s.path: (s, over) for s, over in found if self.names(s)}
        if not chosen and not skip:
            raise TunesmithError(f"{self.method} found nothing to train in {type(model).__name__}: {self.lacking}")
        return chosen

    lacking: ClassVar[str] = "it has no parameters"

    def build(self, model, configs, by_path):
        shared = {}  # tied parameters stay tied
        return {path: (by_path[path], values_of(by_path[path], config.names(by_path[path]), shared)) for path, config in configs.items()}

    def count(self, site):
        return sum(site.holder._parameters[name].numel() for name in self.names(site))


class LinearProbe(Full):
    """Only the head trains: everything outside a Hugging Face model's backbone, or else the last linear layer."""

    method, title, paper = "linear-probe", "Linear probe", "arXiv:1610.01644"
    lacking = "no head; name the layers with targets"
    default_lr = 1e-2

    def default(self, model):
        heads = set(head_paths(model))
        return [s for s in sites(model) if s.path in heads]


class BitFit(Full):
    """BitFit (Ben Zaken et al. 2021): only biases train."""

    method, title, paper = "bitfit", "Bias-term fine-tuning", "arXiv:2106.10199"
    lacking = "no biases; ln-tuning or ia3 train as few parameters"
    default_lr = 2e-3

    def names(self, site):
        return tuple(n for n in site.names if n.endswith("bias"))


class LNTuning(Full):
    """LayerNorm tuning (Zhao et al. 2023): the norms' weights and biases train."""

    method, title, paper = "ln-tuning", "LayerNorm tuning", "arXiv:2312.11420"
    works_on = ("norm",)
    lacking = "no norm layers"
    default_lr = 2e-3

    peft_type = "LN_TUNING"

    def default(self, model):
        return [s for s in sites(model) if s.kind == "norm"]

    @classmethod
    def from_peft(cls, fields, model, found):
        paths = {key.partition(".ln_tuning_layers.")[0] for key in found if ".ln_tuning_layers." in key}
        check_paths(fields, model, cls.works_on, paths)
        return cls(targets=sorted(paths)), {path: {} for path in sorted(paths)}

    def peft_tensors(self, site, own):
        return {f"ln_tuning_layers.{key}": t for key, t in own.items()}

    def own_tensors(self, site, theirs):
        return {key.removeprefix("ln_tuning_layers."): t for key, t in theirs.items()}
