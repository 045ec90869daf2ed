"""What is hidden, for whoever runs the server: printed by `oracle-server model-card`, and no route knows of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from oracle_server.engines.build import known_engine
from oracle_server.loading import Classifier, Hidden, load_hidden
from oracle_server.settings import Settings
from oracle_server.sources.onnx_file import count_parameters
from oracle_server.sources.preprocessing import Preprocessing
from oracle_server.sources.program import Program, file_digest


class ModelCard(BaseModel):
    """Of a model, for its operator.

    Attributes:
        model: as it was named.
        source: name (ours or torchvision's), timm, hf-hub, torch.export, torchscript, onnx or code.
        architecture: the network's class, or its kind of program.
        parameters: numbers that were learnt; None where a program does not show them.
        weights_sha256: of the weights' names, shapes and values as they were loaded; None where a program does not show
            them.
        files: what it was read from, each with its SHA-256.
        image_shape: (c, h, w) of what clients send, in [0, 1].
        preprocessing: what happens to it before the network; None for a reconstructor.
        classes: of a classifier.
        answers: what clients are told before a policy changes it.
        batch: images that its program takes at once, where that is bounded.
        engine: what computes it, as found at an earlier start; None where that is not known yet.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    source: str
    architecture: str
    parameters: int | None
    weights_sha256: str | None
    files: dict[str, str]
    image_shape: tuple[int, int, int]
    preprocessing: Preprocessing | None
    classes: int | None
    answers: str
    batch: str | None
    engine: str | None

    def lines(self) -> Iterator[tuple[str, str]]:
        """What there is to say, each with its name."""
        for name, value in self.model_dump(exclude={"files", "preprocessing"}).items():
            if value is not None:
                yield name, f"{value:,}" if isinstance(value, int) else str(value)
        for path, digest in self.files.items():
            yield "file", f"{path}  sha256 {digest}"
        if self.preprocessing is not None:
            for name, value in self.preprocessing.model_dump().items():
                yield f"preprocessing.{name}", str(value)


def make_card(settings: Settings) -> ModelCard:
    """Load what the settings name and describe it.

    Raises:
        ModelError: as `load_hidden`.
    """
    hidden = load_hidden(settings)
    return describe(hidden, settings)


def describe(hidden: Hidden, settings: Settings) -> ModelCard:
    """The card of a model that was loaded."""
    model = hidden.model
    tensors = dict(model.module.state_dict())
    parameters = sum(parameter.numel() for parameter in model.module.parameters()) or None
    if hidden.source == "onnx":
        parameters = count_parameters(hidden.files[0])
    return ModelCard(
        model=settings.model_name,
        source=hidden.source,
        architecture=hidden.architecture,
        parameters=parameters,
        weights_sha256=_digest(tensors) if tensors else None,
        files={str(path): file_digest(path) for path in hidden.files},
        image_shape=model.image_shape,
        preprocessing=hidden.preprocessing,
        classes=model.classes if isinstance(model, Classifier) else None,
        answers=_answers(hidden),
        batch=_batch(model.module),
        engine=known_engine(model, settings),
    )


def _answers(hidden: Hidden) -> str:
    if hidden.preprocessing is None:
        return "a reconstruction"
    output = hidden.preprocessing.output
    return output if output == "logits" else f"logits: the network's {output}"


def _batch(module: nn.Module) -> str | None:
    program = next((layer for layer in module.modules() if isinstance(layer, Program)), None)
    if program is None or (program.least, program.most) == (1, None):
        return None
    return f"{program.least} or more" if program.most is None else f"{program.least} to {program.most}"


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
