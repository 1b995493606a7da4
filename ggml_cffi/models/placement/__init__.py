"""Placement: the device of each layer, and the bytes on each device, both known before loading.

``place`` decides, ``measure`` counts bytes by a dry run, ``plan`` reports, ``auto`` chooses a split by timing the
model, and ``calibration`` measures the speed of matrix products on a device.
"""

from ggml_cffi.models.placement.options import RESERVE, SPLITS, Balance, LoadOptions, Workload, check_options
from ggml_cffi.models.placement.place import place_layers, split_layers
from ggml_cffi.models.placement.placement import DevicePlan, Placement
from ggml_cffi.models.placement.plan import ModelPlan, plan
from ggml_cffi.models.placement.planner import Planner
from ggml_cffi.models.placement.speed import SpeedEstimate

__all__ = [
    "RESERVE",
    "SPLITS",
    "Balance",
    "DevicePlan",
    "LoadOptions",
    "ModelPlan",
    "Placement",
    "Planner",
    "SpeedEstimate",
    "Workload",
    "check_options",
    "place_layers",
    "plan",
    "split_layers",
]
