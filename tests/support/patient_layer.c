/* A Vulkan layer for software devices: who asks whether a fence is signalled waits up to a millisecond for it.
 *
 * ggml asks in a loop, which takes a processor from the driver's threads that compile and compute. A real GPU has its own.
 * The types are those of the Vulkan loader's layer interface, version 2, as far as they are needed. Compiled by conftest.py.
 */
#include <stdint.h>
#include <string.h>

typedef void (*Function)(void);
typedef Function (*GetAddress)(void *object, const char *name);
typedef struct Link {
    struct Link *next;
    GetAddress instance_address;
    GetAddress device_address; /* in an instance's link: of physical devices */
} Link;
typedef struct Info { /* VkLayerInstanceCreateInfo and VkLayerDeviceCreateInfo, which begin alike */
    int32_t type;
    struct Info *next;
    int32_t function;
    Link *link;
} Info;
typedef struct {
    int32_t type;
    void *next;
    uint32_t version;
    GetAddress instance_address, device_address, physical_device_address;
} Negotiated;

static GetAddress next_instance_address, next_device_address;
static int32_t (*fence_status)(void *device, uint64_t fence);
static int32_t (*wait_for_fences)(void *device, uint32_t count, const uint64_t *fences, uint32_t all, uint64_t ns);

static Info *link_info(const void *created, int32_t type) {
    Info *info = ((Info *)created)->next;
    while (info && !(info->type == type && info->function == 0)) info = info->next;
    return info;
}

static int32_t create_instance(const void *created, const void *allocator, void **instance) {
    Info *info = link_info(created, 47);
    if (!info) return -3; /* VK_ERROR_INITIALIZATION_FAILED */
    next_instance_address = info->link->instance_address;
    info->link = info->link->next;
    return ((int32_t (*)(const void *, const void *, void **))next_instance_address(0, "vkCreateInstance"))(
        created, allocator, instance);
}

static int32_t create_device(void *physical, const void *created, const void *allocator, void **device) {
    Info *info = link_info(created, 48);
    if (!info) return -3;
    GetAddress instance_address = info->link->instance_address;
    next_device_address = info->link->device_address;
    info->link = info->link->next;
    int32_t result = ((int32_t (*)(void *, const void *, const void *, void **))instance_address(0, "vkCreateDevice"))(
        physical, created, allocator, device);
    if (result == 0) {
        fence_status = (int32_t (*)(void *, uint64_t))next_device_address(*device, "vkGetFenceStatus");
        wait_for_fences = (int32_t (*)(void *, uint32_t, const uint64_t *, uint32_t, uint64_t))next_device_address(
            *device, "vkWaitForFences");
    }
    return result;
}

static int32_t patient_status(void *device, uint64_t fence) {
    int32_t result = wait_for_fences(device, 1, &fence, 1, 1000000);
    return result == 2 ? fence_status(device, fence) : result; /* VK_TIMEOUT */
}

static Function device_address(void *device, const char *name) {
    if (!strcmp(name, "vkGetDeviceProcAddr")) return (Function)device_address;
    if (!strcmp(name, "vkGetFenceStatus")) return (Function)patient_status;
    return next_device_address(device, name);
}

static Function instance_address(void *instance, const char *name) {
    if (!strcmp(name, "vkGetInstanceProcAddr")) return (Function)instance_address;
    if (!strcmp(name, "vkGetDeviceProcAddr")) return (Function)device_address;
    if (!strcmp(name, "vkCreateInstance")) return (Function)create_instance;
    if (!strcmp(name, "vkCreateDevice")) return (Function)create_device;
    if (!strcmp(name, "vkGetFenceStatus")) return (Function)patient_status;
    return next_instance_address ? next_instance_address(instance, name) : 0;
}

int32_t vkNegotiateLoaderLayerInterfaceVersion(Negotiated *offered) {
    if (offered->version > 2) offered->version = 2;
    offered->instance_address = instance_address;
    offered->device_address = device_address;
    offered->physical_device_address = 0;
    return 0;
}
