"""1. The GPUs of this machine, and their memory. With objects."""

import ggml_cffi as ggml


def main():
    """List the devices."""
    gpus = [d for d in ggml.devices() if not d.is_cpu]
    print(f"GPUs: {len(gpus)}" if gpus else "No GPU: a Vulkan driver is missing. The CPU computes.")
    for device in gpus:
        free, total = device.memory()
        print(f"{device.name}: {device.description}")
        print(f"   {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        assert 0 <= free <= total


if __name__ == "__main__":
    main()
