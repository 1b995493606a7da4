"""Devices of the flat API: it opens GPUs by their numbers among Vulkan's, and no others."""

import pytest


@pytest.fixture
def two_gpus(vulkan, two_gpus):
    """Names of two Vulkan devices; the test is skipped if ``--devices`` names others."""
    return two_gpus


@pytest.fixture
def devices(devices, request):
    """Names of devices to compute on; the test is skipped if ``--devices`` names GPUs that are not Vulkan's."""
    if devices != ("CPU",):
        request.getfixturevalue("vulkan")
    return devices
