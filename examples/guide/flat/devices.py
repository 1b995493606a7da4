"""1. The GPUs of this machine, and their memory. With the flat API."""
# ruff: noqa: F403, F405

from ggml_cffi.flat import *


def main():
    """List the devices."""
    if not ggml_vulkan_available():
        print("Vulkan is missing: no plug-in or no loader (ggml-cffi devices shows what there is). The CPU computes.")
        return
    n = ggml_vulkan_device_count()
    print(f"Vulkan devices: {n}" if n else "No GPU: a Vulkan driver is missing. The CPU computes.")
    for i in range(n):
        memory = ggml_vulkan_device_memory(i)
        print(f"{i}: {ggml_vulkan_device_description(i)}")
        print(f"   {memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")
        assert 0 <= memory.free <= memory.total


if __name__ == "__main__":
    main()
