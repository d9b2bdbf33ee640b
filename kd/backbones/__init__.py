"""Nets: those of the literature for small images, and any timm model."""

from dalikd.kd.backbones.auxiliary import AuxiliaryNet
from dalikd.kd.backbones.factory import create_model
from dalikd.kd.backbones.layers import NetOutput, StagedNet
from dalikd.kd.backbones.timm_models import input_statistics

__all__ = ["AuxiliaryNet", "NetOutput", "StagedNet", "create_model", "input_statistics"]
