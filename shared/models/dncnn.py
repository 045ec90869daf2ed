"""DnCNN: Zhang et al., "Beyond a Gaussian Denoiser", TIP 2017, with the settings of Zhang et al., ICLR 2022."""

from __future__ import annotations

from torch import Tensor, nn


class DnCNN(nn.Module):
    """The paper's denoiser: it predicts the noise and subtracts it.

    conv + ReLU, (depth - 2) x (conv without bias + batch norm + ReLU), conv; all 3 x 3, so any h and w will do.

    Raises:
        ValueError: fewer than two layers.
    """

    def __init__(self, channels: int, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"a DnCNN has at least 2 layers, not {depth}")
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                # The widely copied PyTorch port also sets momentum 0.95, in Keras's meaning of the word: in torch's it
                # makes the running statistics nearly those of the last batch alone, so the default 0.1 stays.
                nn.BatchNorm2d(width, eps=1e-4),
                nn.ReLU(),
            ]
        layers.append(nn.Conv2d(width, channels, 3, padding=1, bias=False))
        self.net = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Noisy images [b, c, h, w] -> denoised [b, c, h, w], not clamped to [0, 1]."""
        # D(x) = x - R(x), R(x) an estimate of the noise (TIP 2017, section III).
        return images - self.net(images)  # type: ignore[no-any-return]
