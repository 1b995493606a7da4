/* The functions of the Vulkan loader that ggml's plug-in calls by name, each looked up in libvulkan.so.1 at its first call.
 * A plug-in that is linked with this file names no library that a machine may lack. dlopen returns the loader that the
 * process already has, if its SONAME is the same; the functions here are hidden, so no other library sees them. */

#include <dlfcn.h>
#include <stddef.h>
#include <string.h>
#include <vulkan/vulkan_core.h>

static PFN_vkVoidFunction find(const char *name) {
    void *loader = dlopen("libvulkan.so.1", RTLD_NOW | RTLD_LOCAL);
    return loader ? (PFN_vkVoidFunction) dlsym(loader, name) : NULL;
}

#define FIND(name) \
    static PFN_##name found; \
    if (!found) found = (PFN_##name) find(#name)

static VkResult no_loader(uint32_t *version) {
    (void) version;
    return VK_ERROR_INITIALIZATION_FAILED;
}

PFN_vkVoidFunction vkGetInstanceProcAddr(VkInstance instance, const char *name) {
    FIND(vkGetInstanceProcAddr);
    if (found) return found(instance, name);
    /* The first function that the plug-in calls. Its error makes ggml give up the plug-in, without a crash. */
    return strcmp(name, "vkEnumerateInstanceVersion") ? NULL : (PFN_vkVoidFunction) no_loader;
}

PFN_vkVoidFunction vkGetDeviceProcAddr(VkDevice device, const char *name) {
    FIND(vkGetDeviceProcAddr);
    return found(device, name);
}

void vkGetPhysicalDeviceFeatures2(VkPhysicalDevice device, VkPhysicalDeviceFeatures2 *features) {
    FIND(vkGetPhysicalDeviceFeatures2);
    found(device, features);
}

void vkCmdCopyBuffer(VkCommandBuffer commands, VkBuffer from, VkBuffer to, uint32_t count, const VkBufferCopy *regions) {
    FIND(vkCmdCopyBuffer);
    found(commands, from, to, count, regions);
}
