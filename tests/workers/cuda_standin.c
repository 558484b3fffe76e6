/* A stand-in for libcuda.so.1: the entry points that kvledger uses, on host memory, as strict as the driver is.

   "Device" memory is a mapped file below $STANDIN_DIR, so that an IPC handle (the file's name) works across processes.
   A copy must have a context, a registered host side and a known device side. Streams are queues that make progress
   only when somebody asks for an event or synchronises; a stream stands still while $STANDIN_DIR/hold.N exists (N: its
   number in the process). Lines "SYMBOL CODE" in $STANDIN_DIR/fail make a call return CODE; "fatal" instead of a
   symbol makes queued copies fail. Every call is a line in $STANDIN_DIR/calls.PID. Built with -DNO_BATCH it has no
   cuMemcpyBatchAsync, as drivers before CUDA 12.8. */

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NO_DEVICE = 100, BAD_DEVICE = 101, NO_CONTEXT = 201, MAPPED = 208,
       BAD_HANDLE = 400, NOT_READY = 600, REGISTERED = 712, NOT_REGISTERED = 713 };
typedef struct { char name[64]; } Handle;
typedef struct { uintptr_t base; size_t size; char name[64]; int foreign; } Region;
typedef struct Event { int fired, code; } Event;
typedef struct { int kind; uintptr_t target, source; size_t size; Event *event; } Op; /* 0 copy, 1 record, 2 wait */
typedef struct { int number, first, last; size_t room; Op *ops; } Stream;

static Region device_regions[256], host_regions[64];
static int device_count_of_regions, host_count, stream_count, depth, made;
static void *contexts[16]; /* this thread's stack; the current one is contexts[depth] */
static Stream *streams[64];

static void path_of(char *path, const char *name) { snprintf(path, 512, "%s/%s", getenv("STANDIN_DIR"), name); }

static int planned(const char *symbol) {
    char path[512], name[64];
    int code, found = OK;
    path_of(path, "fail");
    FILE *file = fopen(path, "r");
    if (!file) return OK;
    while (fscanf(file, "%63s %d", name, &code) == 2)
        if (!strcmp(name, symbol)) found = code;
    fclose(file);
    return found;
}

static int called(const char *symbol, const char *details) {
    char path[512], name[64];
    snprintf(name, sizeof name, "calls.%d", getpid());
    path_of(path, name);
    FILE *file = fopen(path, "a");
    fprintf(file, "%s %s\n", symbol, details);
    fclose(file);
    return planned(symbol);
}

#define CALLED(details) do { int code = called(__func__, details); if (code) return code; } while (0)
#define IN_CONTEXT do { if (!contexts[depth]) return NO_CONTEXT; } while (0)

static int devices(void) { const char *text = getenv("STANDIN_DEVICES"); return text ? atoi(text) : 1; }

static Region *holding(Region *regions, int count, uintptr_t at, size_t size) {
    for (int i = 0; i < count; i++)
        if (regions[i].base && at >= regions[i].base && at + size <= regions[i].base + regions[i].size) return &regions[i];
    return NULL;
}

int cuInit(unsigned flags) { CALLED(""); return devices() ? OK : NO_DEVICE; }
int cuDeviceGetCount(int *count) { CALLED(""); *count = devices(); return OK; }
int cuDeviceGet(int *device, int ordinal) { CALLED(""); *device = ordinal; return ordinal < devices() ? OK : BAD_DEVICE; }
int cuDeviceGetUuid_v2(char *uuid, int device) {
    const char *first = getenv("STANDIN_FIRST_DEVICE");
    char text[17];
    CALLED("");
    snprintf(text, sizeof text, "standin-gpu-%04d", device + (first ? atoi(first) : 0));
    memcpy(uuid, text, 16);
    return OK;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { CALLED(""); *context = (void *)(uintptr_t)(device + 1); return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { CALLED(""); return OK; }
int cuCtxPushCurrent_v2(void *context) { CALLED(""); contexts[++depth] = context; return OK; }
int cuCtxPopCurrent_v2(void **context) { CALLED(""); *context = contexts[depth--]; return OK; }
int cuCtxSetCurrent(void *context) { CALLED(""); contexts[depth] = context; return OK; }

int cuPointerGetAttribute(void *data, int attribute, uintptr_t at) {
    CALLED("");
    if (attribute != 9 || !holding(device_regions, device_count_of_regions, at, 1)) return INVALID;
    *(int *)data = 0;
    return OK;
}
int cuMemGetAddressRange_v2(uintptr_t *base, size_t *size, uintptr_t at) {
    CALLED("");
    IN_CONTEXT;
    Region *region = holding(device_regions, device_count_of_regions, at, 1);
    if (!region) return INVALID;
    *base = region->base;
    *size = region->size;
    return OK;
}

static int map_file(const char *name, size_t size, int create, uintptr_t *at) {
    char path[512];
    struct stat status;
    path_of(path, name);
    int file = open(path, O_RDWR | (create ? O_CREAT | O_EXCL : 0), 0600);
    if (file < 0) return BAD_HANDLE;
    if (create && ftruncate(file, size)) return NO_MEMORY;
    fstat(file, &status);
    void *map = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (map == MAP_FAILED) return NO_MEMORY;
    Region *region = &device_regions[device_count_of_regions++];
    *region = (Region){(uintptr_t)map, status.st_size, "", !create};
    snprintf(region->name, sizeof region->name, "%s", name);
    *at = (uintptr_t)map;
    return OK;
}

int cuMemAlloc_v2(uintptr_t *at, size_t size) {
    char name[64];
    CALLED("");
    IN_CONTEXT;
    snprintf(name, sizeof name, "memory.%d.%d", getpid(), made++);
    return map_file(name, size, 1, at);
}
int cuMemFree_v2(uintptr_t at) {
    char path[512];
    CALLED("");
    Region *region = holding(device_regions, device_count_of_regions, at, 1);
    if (!region || region->base != at || region->foreign) return INVALID;
    path_of(path, region->name);
    unlink(path);
    munmap((void *)region->base, region->size);
    region->base = 0;
    return OK;
}
int cuIpcGetMemHandle(Handle *handle, uintptr_t at) {
    CALLED("");
    IN_CONTEXT;
    Region *region = holding(device_regions, device_count_of_regions, at, 1);
    if (!region || region->base != at || region->foreign) return INVALID;
    memset(handle, 0, sizeof *handle);
    snprintf(handle->name, sizeof handle->name, "%s", region->name);
    return OK;
}
int cuIpcOpenMemHandle_v2(uintptr_t *at, Handle handle, unsigned flags) {
    int pid = -1;
    CALLED("");
    IN_CONTEXT;
    if (sscanf(handle.name, "memory.%d.", &pid) != 1) return BAD_HANDLE;
    if (pid == getpid()) return NO_CONTEXT; /* not in the process that made it */
    for (int i = 0; i < device_count_of_regions; i++)
        if (device_regions[i].base && !strcmp(device_regions[i].name, handle.name)) return MAPPED;
    return map_file(handle.name, 0, 0, at);
}
int cuIpcCloseMemHandle(uintptr_t at) {
    CALLED("");
    Region *region = holding(device_regions, device_count_of_regions, at, 1);
    if (!region || !region->foreign) return INVALID;
    munmap((void *)region->base, region->size);
    region->base = 0;
    return OK;
}
int cuMemHostRegister_v2(void *at, size_t size, unsigned flags) {
    char details[64];
    snprintf(details, sizeof details, "bytes=%zu", size);
    CALLED(details);
    IN_CONTEXT;
    if (holding(host_regions, host_count, (uintptr_t)at, 1)) return REGISTERED;
    host_regions[host_count++] = (Region){(uintptr_t)at, size, "", 0};
    return OK;
}
int cuMemHostUnregister(void *at) {
    CALLED("");
    Region *region = holding(host_regions, host_count, (uintptr_t)at, 1);
    if (!region || region->base != (uintptr_t)at) return NOT_REGISTERED;
    region->base = 0;
    return OK;
}

int cuStreamCreate(Stream **stream, unsigned flags) {
    CALLED(flags == 1 ? "non-blocking" : "");
    IN_CONTEXT;
    *stream = streams[stream_count] = calloc(1, sizeof(Stream));
    (*stream)->number = stream_count++;
    return OK;
}
static void add(Stream *stream, Op op) {
    if ((size_t)stream->last == stream->room) {
        stream->room = stream->room ? 2 * stream->room : 1024;
        stream->ops = realloc(stream->ops, stream->room * sizeof(Op));
    }
    stream->ops[stream->last++] = op;
}
static int advance(Stream *stream) {
    char name[32], path[512];
    int before = stream->first, code = planned("fatal");
    snprintf(name, sizeof name, "hold.%d", stream->number);
    path_of(path, name);
    if (!access(path, F_OK)) return 0;
    for (; stream->first < stream->last; stream->first++) {
        Op *op = &stream->ops[stream->first];
        if (op->kind == 2 && !op->event->fired) break;
        if (op->kind == 0 && !code) memcpy((void *)op->target, (void *)op->source, op->size);
        if (op->kind == 1) *op->event = (Event){1, code};
    }
    return stream->first > before;
}
static void advance_all(void) {
    for (int moved = 1; moved;) {
        moved = 0;
        for (int i = 0; i < stream_count; i++)
            if (streams[i]) moved |= advance(streams[i]);
    }
}
int cuStreamDestroy_v2(Stream *stream) { CALLED(""); streams[stream->number] = NULL; return OK; }
int cuStreamWaitEvent(Stream *stream, Event *event, unsigned flags) {
    CALLED("");
    add(stream, (Op){2, 0, 0, 0, event});
    return OK;
}
int cuStreamSynchronize(Stream *stream) {
    CALLED("");
    while (advance_all(), stream->first < stream->last) usleep(1000);
    return planned("fatal");
}
int cuEventCreate(Event **event, unsigned flags) { CALLED(""); *event = calloc(1, sizeof(Event)); return OK; }
int cuEventRecord(Event *event, Stream *stream) { CALLED(""); add(stream, (Op){1, 0, 0, 0, event}); return OK; }
int cuEventQuery(Event *event) {
    int code = planned("cuEventQuery");
    if (code) return code;
    advance_all();
    return event->fired ? event->code : NOT_READY;
}
int cuEventDestroy_v2(Event *event) { CALLED(""); return OK; }

static int queue(Stream *stream, uintptr_t target, uintptr_t source, size_t size) {
    int out = holding(host_regions, host_count, target, size) && holding(device_regions, device_count_of_regions, source, size);
    int in = holding(device_regions, device_count_of_regions, target, size) && holding(host_regions, host_count, source, size);
    IN_CONTEXT;
    if (!stream || !(out || in)) return INVALID;
    add(stream, (Op){0, target, source, size, NULL});
    return OK;
}
int cuMemcpyAsync(uintptr_t target, uintptr_t source, size_t size, Stream *stream) {
    char details[64];
    snprintf(details, sizeof details, "stream=%d bytes=%zu", stream->number, size);
    CALLED(details);
    return queue(stream, target, source, size);
}
#ifndef NO_BATCH
typedef struct { int order, source_type, source_id, target_type, target_id; unsigned flags; } Attributes;
int cuMemcpyBatchAsync(uintptr_t *targets, uintptr_t *sources, size_t *sizes, size_t count, Attributes *attributes,
                       size_t *first, size_t attribute_count, size_t *failed, Stream *stream) {
    char details[128];
    if (attribute_count != 1 || *first || attributes->flags || !count) return INVALID;
    snprintf(details, sizeof details, "stream=%d count=%zu order=%d", stream->number, count, attributes->order);
    *failed = 0;
    CALLED(details);
    for (size_t i = 0; i < count; i++) {
        int code = queue(stream, targets[i], sources[i], sizes[i]);
        if (code) { *failed = i; return code; }
    }
    return OK;
}
#endif

static const struct { int code; const char *name, *text; } errors[] = {
    {INVALID, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {NO_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {BAD_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {NO_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {MAPPED, "CUDA_ERROR_ALREADY_MAPPED", "resource already mapped"},
    {BAD_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
};
int cuGetErrorName(int code, const char **text) {
    *text = NULL;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) *text = errors[i].name;
    return *text ? OK : INVALID;
}
int cuGetErrorString(int code, const char **text) {
    *text = NULL;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) *text = errors[i].text;
    return *text ? OK : INVALID;
}
