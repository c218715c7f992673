/* A stand-in for NVIDIA's management library, for tests of what reads it: GPUs, processes and errors come from the text
   file that NVML_STAND_IN names, read again at each call. Its lines:
     gpu UUID TOTAL_BYTES FREE_BYTES MAJOR MINOR UNCORRECTED_ECC IS_LOST
     process GPU_INDEX PID BYTES      (GPU_INDEX of a MIG instance: 100 + its place among the lines `mig`)
     xid GPU_INDEX NUMBER        (each is told once, in order)
     xid_of GPU_INDEX NUMBER GPU_INSTANCE
     remap GPU_INDEX PENDING FAILED
     mig_mode GPU_INDEX
     mig GPU_INDEX NUMBER UUID GPU_INSTANCE TOTAL_BYTES FREE_BYTES
   As the driver does, it tells no errors and no capability of an instance, and no remapping of a GPU without a line. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, TIMEOUT = 10, GPU_IS_LOST = 15, MAX_GPUS = 8, MAX_ROWS = 64 };
typedef unsigned long long u64;
typedef struct {
    char uuid[96];
    u64 total, free;
    int major, minor;
    u64 ecc;
    int is_lost, is_partitioned, remaps, pending, failed;
} Gpu;
typedef struct { int gpu, number; char uuid[96]; unsigned gpu_instance; u64 total, free; } Mig;
typedef struct { int gpu; unsigned pid; u64 bytes; } Process;
typedef struct { int gpu; u64 number; unsigned gpu_instance; } Xid;
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned pid; u64 used_bytes; unsigned gpu_instance, compute_instance; } ProcessInfo;
typedef struct { void *device; u64 type, data; unsigned gpu_instance, compute_instance; } EventData;

static Gpu gpus[MAX_GPUS];
static Mig migs[MAX_GPUS];
static Process processes[MAX_ROWS];
static Xid xids[MAX_ROWS];
static int num_gpus, num_migs, num_processes, num_xids, num_told;

static void read_state(void) {
    char line[256];
    FILE *file = fopen(getenv("NVML_STAND_IN"), "r");
    num_gpus = num_migs = num_processes = num_xids = 0;
    while (file && fgets(line, sizeof line, file)) {
        Gpu g = {0}; Mig m; Process p; Xid x = {.gpu_instance = ~0u};
        int gpu, pending, failed;
        if (num_gpus < MAX_GPUS && sscanf(line, "gpu %95s %llu %llu %d %d %llu %d", g.uuid, &g.total, &g.free, &g.major,
                                          &g.minor, &g.ecc, &g.is_lost) == 7) gpus[num_gpus++] = g;
        if (num_processes < MAX_ROWS && sscanf(line, "process %d %u %llu", &p.gpu, &p.pid, &p.bytes) == 3)
            processes[num_processes++] = p;
        if (num_xids < MAX_ROWS && (sscanf(line, "xid %d %llu", &x.gpu, &x.number) == 2 ||
                                    sscanf(line, "xid_of %d %llu %u", &x.gpu, &x.number, &x.gpu_instance) == 3))
            xids[num_xids++] = x;
        if (sscanf(line, "remap %d %d %d", &gpu, &pending, &failed) == 3)
            gpus[gpu].remaps = 1, gpus[gpu].pending = pending, gpus[gpu].failed = failed;
        if (sscanf(line, "mig_mode %d", &gpu) == 1) gpus[gpu].is_partitioned = 1;
        if (num_migs < MAX_GPUS && sscanf(line, "mig %d %d %95s %u %llu %llu", &m.gpu, &m.number, m.uuid,
                                          &m.gpu_instance, &m.total, &m.free) == 6) migs[num_migs++] = m;
    }
    if (file) fclose(file);
}

static int is_mig(void *device) { return device >= (void *)migs && device < (void *)(migs + MAX_GPUS); }
static int index_of(void *device) { return is_mig(device) ? 100 + (int)((Mig *)device - migs) : (int)((Gpu *)device - gpus); }
static int put(char *text, unsigned size, const char *value) { snprintf(text, size, "%s", value); return SUCCESS; }

int nvmlInitWithFlags(unsigned flags) { (void)flags; read_state(); return SUCCESS; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == GPU_IS_LOST ? "GPU is lost" : "error of the stand-in"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { return put(text, size, "570.00"); }
int nvmlDeviceGetCount_v2(unsigned *count) { read_state(); *count = (unsigned)num_gpus; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if ((int)index >= num_gpus) return NOT_FOUND;
    *device = &gpus[index];
    return SUCCESS;
}
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) {
    return put(text, size, is_mig(device) ? ((Mig *)device)->uuid : ((Gpu *)device)->uuid);
}
int nvmlDeviceGetName(void *device, char *text, unsigned size) {
    return put(text, size, is_mig(device) ? "Stand-in GPU MIG 1g.10gb" : "Stand-in GPU");
}
int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    if (is_mig(device)) return 2; /* an invalid argument */
    if (((Gpu *)device)->major < 8) return NOT_SUPPORTED;
    *current = *pending = (unsigned)((Gpu *)device)->is_partitioned;
    return SUCCESS;
}
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) { (void)device; *count = 7; return SUCCESS; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned number, void **found) {
    for (int i = 0; i < num_migs; i++)
        if (migs[i].gpu == index_of(device) && migs[i].number == (int)number) {
            *found = &migs[i];
            return SUCCESS;
        }
    return NOT_FOUND;
}
int nvmlDeviceGetGpuInstanceId(void *device, unsigned *id) {
    if (!is_mig(device)) return 2;
    *id = ((Mig *)device)->gpu_instance;
    return SUCCESS;
}
int nvmlDeviceGetRemappedRows(void *device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    read_state();
    Gpu *gpu = device;
    if (is_mig(device) || !gpu->remaps) return NOT_SUPPORTED;
    *corrected = *uncorrected = 0;
    *pending = (unsigned)gpu->pending;
    *failed = (unsigned)gpu->failed;
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    if (is_mig(device)) return NOT_SUPPORTED;
    *major = ((Gpu *)device)->major;
    *minor = ((Gpu *)device)->minor;
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    read_state();
    if (is_mig(device)) {
        Mig *mig = device;
        *memory = (Memory){mig->total, mig->free, mig->total - mig->free};
        return SUCCESS;
    }
    Gpu *gpu = device;
    if (gpu->is_lost) return GPU_IS_LOST;
    *memory = (Memory){gpu->total, gpu->free, gpu->total - gpu->free};
    return SUCCESS;
}
int nvmlDeviceGetTotalEccErrors(void *device, int kind, int since, u64 *count) {
    (void)since;
    if (is_mig(device)) return NOT_SUPPORTED;
    *count = kind == 1 ? ((Gpu *)device)->ecc : 0; /* 1: uncorrected */
    return SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, ProcessInfo *found) {
    unsigned room = *count, number = 0;
    for (int i = 0; i < num_processes; i++) {
        if (processes[i].gpu != index_of(device)) continue;
        if (found && number < room) found[number] = (ProcessInfo){processes[i].pid, processes[i].bytes, ~0u, ~0u};
        number++;
    }
    *count = number;
    return number > room || (number && !found) ? INSUFFICIENT_SIZE : SUCCESS;
}
int nvmlEventSetCreate(void **set) { *set = &num_told; return SUCCESS; }
int nvmlDeviceRegisterEvents(void *device, u64 types, void *set) { (void)device; (void)set; return types == 8 ? SUCCESS : 2; }
int nvmlEventSetWait_v2(void *set, EventData *event, unsigned timeout_ms) {
    (void)set;
    (void)timeout_ms;
    read_state();
    if (num_told >= num_xids) return TIMEOUT;
    *event = (EventData){&gpus[xids[num_told].gpu], 8, xids[num_told].number, xids[num_told].gpu_instance, ~0u};
    num_told++;
    return SUCCESS;
}
