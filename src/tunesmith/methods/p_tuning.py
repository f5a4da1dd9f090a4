"""P-tuning: a soft prompt that a small network computes while it trains."""

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ..engine.model import adapters, record_of
from ..engine.sites import float_dtype
from ..errors import TunesmithError
from .prompt_tuning import PromptLayer, SoftPrompt


class Recurrent(nn.Module):
    """A bidirectional LSTM and two linear layers, (m, d) to (m, d): the encoder of the paper."""

    def __init__(self, width: int, hidden: int, layers: int, **kind):
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, layers, bidirectional=True, batch_first=True, **kind)
        self.head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden, **kind), nn.ReLU(), nn.Linear(2 * hidden, width, **kind))

    def forward(self, e: Tensor) -> Tensor:
        return self.head(self.lstm(e)[0])


class PTuningLayer(PromptLayer):
    """The prompt P = encoder(e), e and P (m, d); P itself trains where there is no encoder."""

    def __init__(self, config: "PTuning", embeddings: nn.Module, keep: bool):
        super().__init__(config, embeddings, keep)
        self.encoder = config.network(self.prompt.shape[1], self.prompt.device, float_dtype(embeddings.weight))

    def vectors(self):
        return self.prompt if self.encoder is None else self.encoder(self.prompt)

    def drop_encoder(self):
        self.prompt = nn.Parameter(self.vectors().detach(), self.prompt.requires_grad)
        self.encoder = None


class PTuning(SoftPrompt):
    """P-tuning (Liu et al. 2021, arXiv 2103.10385): the prompt P = encoder(e) in front of the input, e (m, d).

    `encoder`: `mlp`, three linear layers d → h → h → d with ReLU between, as Hugging Face peft's default; `lstm`, a bidirectional
    LSTM and two linear layers, as in the paper; or none, which trains P itself. It serves training alone: `drop_encoder` puts P in
    its place, and peft's files hold P, so that an adapter read from one has none.
    """

    method, title, paper = "p-tuning", "P-tuning", "arXiv:2103.10385"

    encoder: Literal["mlp", "lstm"] | None = "mlp"
    encoder_hidden_size: PositiveInt | None = Field(None, description="width h of the encoder; default: that of the embeddings")
    encoder_num_layers: PositiveInt = Field(2, description="layers of the LSTM")

    layer_class = PTuningLayer

    def network(self, width: int, device, dtype=None) -> nn.Module | None:
        """The encoder of embeddings of this width."""
        h, kind = self.encoder_hidden_size or width, {"device": device, "dtype": dtype}
        if self.encoder == "lstm":
            return Recurrent(width, h, self.encoder_num_layers, **kind)
        if self.encoder == "mlp":
            return nn.Sequential(nn.Linear(width, h, **kind), nn.ReLU(), nn.Linear(h, h, **kind), nn.ReLU(), nn.Linear(h, width, **kind))
        return None

    def size(self, width):
        d, h = width, self.encoder_hidden_size or width
        if self.encoder == "mlp":
            return super().size(width) + 2 * d * h + h * h + 2 * h + d
        if self.encoder == "lstm":
            cells = 8 * h * (d + h + 2) + (self.encoder_num_layers - 1) * 8 * h * (3 * h + 2)
            return super().size(width) + cells + 2 * h * (2 * h + 1) + d * (2 * h + 1)
        return super().size(width)

    peft_type, plain = "P_TUNING", {"encoder": None}

    def to_peft(self, configs, model):
        fields = super().to_peft(configs, model)
        return fields | {
            "encoder_reparameterization_type": (self.encoder or "mlp").upper(), "encoder_hidden_size": self.encoder_hidden_size or fields["token_dim"],
            "encoder_num_layers": self.encoder_num_layers, "encoder_dropout": 0.0,
        }  # fmt: skip

    def peft_tensors(self, site, own):
        if not own or self.encoder is None:
            return super().peft_tensors(site, own)
        return {"prompt_embeddings": encoded(self.network(own["prompt"].shape[1], "meta"), own, "prompt")}


@torch.no_grad()
def encoded(network: nn.Module, own: dict[str, Tensor], name: str) -> Tensor:
    """What a network, on no device yet, makes of an adapter's tensor `name` with the adapter's `encoder` tensors."""
    network.load_state_dict({key.removeprefix("encoder."): t for key, t in own.items() if key != name}, assign=True)
    return network(own[name])


@torch.no_grad()
def drop_encoder(model: nn.Module, name: str = "default") -> nn.Module:
    """Put what the encoder of a p-tuning or projected prefix-tuning adapter makes in its place, once it is trained. Returns the model.

    The adapter computes what it did, and its file holds the prompt or prefix alone. An optimiser made before does not know the new
    parameter. Raises `TunesmithError` for a name that is not there, and for an adapter without encoder.
    """
    record = record_of(model, name)
    encoders = [each for each in adapters(model, name).values() if getattr(each, "encoder", None) is not None]
    if not encoders:
        raise TunesmithError(f"adapter {name!r} ({record.config.method}) has no encoder to drop; p-tuning and prefix-tuning with prefix_projection have one")
    for each in encoders:
        each.drop_encoder()
    record.config = record.config.model_copy(update=record.config.plain)
    record.sites = {path: config.model_copy(update=config.plain) for path, config in record.sites.items()}
    return model
