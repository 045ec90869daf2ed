"""Denoisers D_theta: images [b, c, h, w] in, images of the same shape out. The only networks of the defender's own."""

from defender_client.models.denoisers import DenoiserSpec, build_denoiser
from defender_client.models.dncnn import DnCNN
from defender_client.models.unet import UNet

__all__ = ["DenoiserSpec", "DnCNN", "UNet", "build_denoiser"]
