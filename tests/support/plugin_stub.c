// A plug-in of ggml with devices that compute nothing, for tests of the loader. The structs are the start of ggml's
// own, in the order of ggml-backend-impl.h. Macros set the behaviour: NAME, DESCRIPTION, TYPE, ADDRESS, SECOND_ADDRESS
// (by default that of the first device), DEVICES (at most 2), API, SCORE, FAILS, NEEDS.
#include <stddef.h>

#ifndef TYPE
#define TYPE 1  // GPU
#endif
#ifndef DESCRIPTION
#define DESCRIPTION "a stub"
#endif
#ifndef ADDRESS
#define ADDRESS NULL
#endif
#ifndef SECOND_ADDRESS
#define SECOND_ADDRESS ADDRESS
#endif
#ifndef DEVICES
#define DEVICES 1
#endif
#ifndef API
#define API 2
#endif

struct device;
struct reg;

struct props {
    const char *name, *description;
    size_t memory_free, memory_total;
    int type;
    const char *device_id;
    _Bool caps[5];
};

struct device {
    const char *(*get_name)(struct device *);
    const char *(*get_description)(struct device *);
    void (*get_memory)(struct device *, size_t *, size_t *);
    int (*get_type)(struct device *);
    void (*get_props)(struct device *, struct props *);
    void *(*init_backend)(struct device *, const char *);
    void *others[9];
    struct reg *reg;
    void *context;
};

struct reg {
    int api_version;
    const char *(*get_name)(struct reg *);
    size_t (*get_device_count)(struct reg *);
    struct device *(*get_device)(struct reg *, size_t);
    void *(*get_proc_address)(struct reg *, const char *);
    void *context;
};

static const char *device_name(struct device *d) { return d->context; }
static const char *device_description(struct device *d) { return DESCRIPTION; }
static int device_type(struct device *d) { return TYPE; }
static void *refuse(struct device *d, const char *params) { return NULL; }

static void device_memory(struct device *d, size_t *free, size_t *total) {
    *free = 1 << 20;
    *total = 2 << 20;
}

static struct device all[2];

static void device_props(struct device *d, struct props *props) {
    const char *address = d == all ? ADDRESS : SECOND_ADDRESS;
    *props = (struct props){d->context, DESCRIPTION, 1 << 20, 2 << 20, TYPE, address, {0}};
}

static struct reg registry;
#define DEVICE(name) \
    {device_name, device_description, device_memory, device_type, device_props, refuse, {0}, &registry, name}
static struct device all[2] = {DEVICE(NAME "0"), DEVICE(NAME "1")};

static const char *reg_name(struct reg *r) { return NAME; }
static size_t device_count(struct reg *r) { return DEVICES; }
static struct device *get_device(struct reg *r, size_t i) { return &all[i]; }
static void *get_address(struct reg *r, const char *name) { return NULL; }
static struct reg registry = {API, reg_name, device_count, get_device, get_address, NULL};

#ifdef FAILS
struct reg *ggml_backend_init(void) { return NULL; }
#else
struct reg *ggml_backend_init(void) { return &registry; }
#endif
#ifdef SCORE
int ggml_backend_score(void) { return SCORE; }
#endif
#ifdef NEEDS
int needed(void);
int use_it(void) { return needed(); }
#endif
