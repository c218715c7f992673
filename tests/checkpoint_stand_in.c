/* A stand-in for the driver's checkpoint calls (libcuda of 570 and later), for tests of what uses them. CHECKPOINT_STAND_IN
   names a folder. A process's state is in its file of that name (0 running, 1 locked, 2 checkpointed; no file: running), and
   the calls keep the driver's order: only a running process is locked, only a locked one checkpointed or unlocked, only a
   checkpointed one restored; a process that does not live is none. Each call is a line of the file `calls`. The file
   `orders`, if it is there, makes calls fail: lines
     refuse NAME STATUS     (the state stays)
     hang NAME MILLISECONDS (and then do as asked)
     busy                   (its CUDA work does not end: Lock waits as long as it may, then 600)                        */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, ILLEGAL_STATE = 401, NOT_READY = 600, RUNNING = 0, LOCKED = 1, CHECKPOINTED = 2 };
typedef struct { unsigned timeout_ms, reserved0; unsigned long long reserved1[7]; } LockArguments;

static FILE *open_in_folder(const char *name, const char *mode) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", getenv("CHECKPOINT_STAND_IN"), name);
    return fopen(path, mode);
}
static int state_of(int pid) {
    char name[32];
    int state = RUNNING;
    snprintf(name, sizeof name, "%d", pid);
    FILE *file = open_in_folder(name, "r");
    if (file && fscanf(file, "%d", &state) != 1) state = RUNNING;
    if (file) fclose(file);
    return state;
}
static void set_state(int pid, int state) {
    char name[32], path[512], new_path[512];
    snprintf(name, sizeof name, "%d.new", pid);
    FILE *file = open_in_folder(name, "w");
    fprintf(file, "%d\n", state);
    fclose(file);
    snprintf(path, sizeof path, "%s/%d", getenv("CHECKPOINT_STAND_IN"), pid);
    snprintf(new_path, sizeof new_path, "%s/%d.new", getenv("CHECKPOINT_STAND_IN"), pid);
    rename(new_path, path);
}
static int begin(const char *name, int pid, unsigned timeout_ms) {
    char line[128];
    char called[32];
    int number;
    FILE *calls = open_in_folder("calls", "a");
    fprintf(calls, "%s %d\n", name, pid);
    fclose(calls);
    if (kill(pid, 0) && errno == ESRCH) return INVALID_VALUE;
    FILE *orders = open_in_folder("orders", "r");
    int status = SUCCESS;
    while (orders && fgets(line, sizeof line, orders)) {
        if (sscanf(line, "refuse %31s %d", called, &number) == 2 && !strcmp(called, name)) status = number;
        if (sscanf(line, "hang %31s %d", called, &number) == 2 && !strcmp(called, name)) usleep(1000u * (unsigned)number);
        if (!strncmp(line, "busy", 4) && !strcmp(name, "Lock")) {
            usleep(1000u * timeout_ms);
            status = NOT_READY;
        }
    }
    if (orders) fclose(orders);
    return status;
}
static int change(const char *name, int pid, unsigned timeout_ms, int from, int to) {
    int status = begin(name, pid, timeout_ms);
    if (status) return status;
    if (state_of(pid) != from) return ILLEGAL_STATE;
    set_state(pid, to);
    return SUCCESS;
}

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
int cuCheckpointProcessGetState(int pid, int *state) {
    int status = begin("GetState", pid, 0);
    *state = state_of(pid);
    return status;
}
int cuCheckpointProcessLock(int pid, LockArguments *arguments) {
    for (int i = 0; arguments && i < 7; i++)
        if (arguments->reserved0 || arguments->reserved1[i]) return INVALID_VALUE;
    return change("Lock", pid, arguments ? arguments->timeout_ms : 60000, RUNNING, LOCKED);
}
int cuCheckpointProcessCheckpoint(int pid, void *arguments) {
    return arguments ? INVALID_VALUE : change("Checkpoint", pid, 0, LOCKED, CHECKPOINTED);
}
int cuCheckpointProcessRestore(int pid, void *arguments) {
    return arguments ? INVALID_VALUE : change("Restore", pid, 0, CHECKPOINTED, LOCKED);
}
int cuCheckpointProcessUnlock(int pid, void *arguments) {
    return arguments ? INVALID_VALUE : change("Unlock", pid, 0, LOCKED, RUNNING);
}
