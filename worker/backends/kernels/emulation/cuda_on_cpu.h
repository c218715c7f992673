// CUDA C on the CPU: runs a kernel's own source with one fiber for each CUDA thread, blocks one after another.
//
// What it enforces, each an error that names block and thread:
//   - __syncthreads and warp collectives must be reached by all that they wait for (divergence, early exit);
//   - shared memory starts as 0xFF bytes (a float NaN) in every block and ends at an inaccessible page;
//   - every argument's memory ends at an inaccessible page (the host side sees to it), so a read or write past its
//     end is caught where it happens; loads of several elements at once must be aligned.
// Threads run in ascending, descending or random order between two barriers: a missing barrier gives a wrong result in
// at least one of them. It shows nothing about timing, occupancy, or memory order between blocks.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace emulation {

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 64 << 10;

enum class State : uint8_t { READY, AT_BARRIER, IN_COLLECTIVE, DONE };
enum class Order : unsigned { ASCENDING, DESCENDING, RANDOM };

struct Fiber {
    void* stack_pointer;
    State state;
    unsigned mask;       // lanes that its collective waits for
    unsigned operation;  // which collective
    uint64_t value[4];   // what it hands to the others
    uint64_t handed[4];  // what they read: its value when the collective was complete
};

inline Fiber fibers[MAX_THREADS];
inline dim3 thread_indices[MAX_THREADS];  // of the launch's block
inline void* scheduler_stack_pointer;
inline unsigned current;
inline unsigned char* stacks;
inline unsigned char* shared_memory;
inline dim3 grid_dim, block_dim, block_index, thread_index;
inline char message[320];
inline uint64_t num_switches;
inline uint64_t random_state = 88172645463325252ull;
inline void (*kernel_body)(void**);
inline void** kernel_arguments;
inline sigjmp_buf escape;

inline uint64_t next_random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

// Saves the callee-saved registers on the stack, stores the stack pointer in *from, goes on at `to`.
extern "C" void emulation_switch(void** from, void* to);
#if defined(__x86_64__)
asm(".text\n.globl emulation_switch\n.type emulation_switch,@function\nemulation_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp,(%rdi)\n  movq %rsi,%rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n");
inline void* make_stack(unsigned char* top, void (*entry)()) {
    uint64_t* words = reinterpret_cast<uint64_t*>(top);
    *--words = 0;  // keeps the stack aligned as a call would leave it
    *--words = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; i++) *--words = 0;
    return words;
}
#elif defined(__aarch64__)
asm(".text\n.globl emulation_switch\n.type emulation_switch,%function\nemulation_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
inline void* make_stack(unsigned char* top, void (*entry)()) {
    uint64_t* words = reinterpret_cast<uint64_t*>(top) - 20;
    memset(words, 0, 160);
    words[11] = reinterpret_cast<uint64_t>(entry);  // x30, where `ret` goes
    return words;
}
#else
#error "emulation_switch has to be written for this processor"
#endif

inline void make_thread_indices(unsigned num_threads) {
    for (unsigned t = 0; t < num_threads; t++)
        thread_indices[t] = {t % block_dim.x, t / block_dim.x % block_dim.y, t / (block_dim.x * block_dim.y)};
}

inline void suspend(State state) {
    unsigned me = current;
    fibers[me].state = state;
    ++num_switches;
    emulation_switch(&fibers[me].stack_pointer, scheduler_stack_pointer);
    current = me;
    thread_index = thread_indices[me];
}

[[noreturn]] inline void fail(const char* what) {
    snprintf(message, sizeof message, "%s in block (%u, %u, %u), thread (%u, %u, %u)", what, block_index.x,
             block_index.y, block_index.z, thread_index.x, thread_index.y, thread_index.z);
    siglongjmp(escape, 1);
}

inline void run_fiber() {
    kernel_body(kernel_arguments);
    unsigned me = current;
    fibers[me].state = State::DONE;
    emulation_switch(&fibers[me].stack_pointer, scheduler_stack_pointer);
    abort();
}

// A warp collective: every lane of `mask` must come with the same mask and operation. What read_lane() gives stays until
// that lane's next collective is complete, and none is while a lane of this one has yet to run on.
inline void enter_collective(unsigned mask, unsigned operation, const void* value, size_t num_bytes) {
    Fiber& me = fibers[current];
    if (!(mask >> (current % 32) & 1)) fail("a warp collective's mask leaves out the calling lane");
    memcpy(me.value, value, num_bytes);
    me.mask = mask;
    me.operation = operation;
    suspend(State::IN_COLLECTIVE);
}
inline const uint64_t* read_lane(unsigned lane) { return fibers[current / 32 * 32 + lane % 32].handed; }
inline void leave_collective() {}  // so nobody has to wait for the readers; kernels say where they have read all

inline bool release_collectives(unsigned num_threads) {
    bool released = false;
    for (unsigned first = 0; first < num_threads; first += 32) {
        unsigned width = num_threads - first < 32 ? num_threads - first : 32;
        unsigned existing = width == 32 ? 0xffffffffu : (1u << width) - 1;
        for (unsigned lane = 0; lane < width; lane++) {
            Fiber& leader = fibers[first + lane];
            if (leader.state != State::IN_COLLECTIVE) continue;
            unsigned wanted = leader.mask & existing, present = 0;
            for (unsigned other = 0; other < width; other++) {
                Fiber& fiber = fibers[first + other];
                if (fiber.state == State::IN_COLLECTIVE && fiber.mask == leader.mask &&
                    fiber.operation == leader.operation)
                    present |= 1u << other;
            }
            if (present != wanted) continue;
            for (unsigned other = 0; other < width; other++) {
                if (!(wanted >> other & 1)) continue;
                memcpy(fibers[first + other].handed, fibers[first + other].value, sizeof fibers[0].value);
                fibers[first + other].state = State::READY;
            }
            released = true;
        }
    }
    return released;
}

// 0: the block ended; otherwise `message` says what stopped it.
inline int settle_block(unsigned num_threads, bool& ended) {
    unsigned done = 0, waiting = 0, collective = 0;
    for (unsigned t = 0; t < num_threads; t++) {
        done += fibers[t].state == State::DONE;
        waiting += fibers[t].state == State::AT_BARRIER;
        collective += fibers[t].state == State::IN_COLLECTIVE;
    }
    ended = done == num_threads;
    if (ended) return 0;
    const char* format = nullptr;
    if (collective) format = "warp collective divergence in block (%u, %u, %u): %u lanes wait, %u threads at a barrier, %u exited";
    else if (done) format = "barrier divergence in block (%u, %u, %u): %u lanes wait, %u threads at a barrier, %u exited";
    if (format) {
        snprintf(message, sizeof message, format, block_index.x, block_index.y, block_index.z, collective, waiting, done);
        return 1;
    }
    for (unsigned t = 0; t < num_threads; t++) fibers[t].state = State::READY;
    return 0;
}

inline int run_block(unsigned num_threads, Order order) {
    static unsigned sequence[MAX_THREADS];
    for (unsigned t = 0; t < num_threads; t++) {
        fibers[t].state = State::READY;
        fibers[t].stack_pointer = make_stack(stacks + (t + 1) * STACK_BYTES, run_fiber);
        sequence[t] = order == Order::DESCENDING ? num_threads - 1 - t : t;
    }
    for (;;) {
        if (order == Order::RANDOM)
            for (unsigned i = num_threads - 1; i > 0; i--) {
                unsigned j = next_random() % (i + 1), swapped = sequence[i];
                sequence[i] = sequence[j];
                sequence[j] = swapped;
            }
        bool progressed = false;
        for (unsigned i = 0; i < num_threads; i++) {
            if (fibers[sequence[i]].state != State::READY) continue;
            progressed = true;
            current = sequence[i];
            thread_index = thread_indices[current];
            emulation_switch(&scheduler_stack_pointer, fibers[current].stack_pointer);
        }
        if (progressed || release_collectives(num_threads)) continue;
        bool ended = false;
        int status = settle_block(num_threads, ended);
        if (status || ended) return status;
    }
}

inline void on_fault(int, siginfo_t* info, void*) {
    snprintf(message, sizeof message, "access out of bounds at %p in block (%u, %u, %u), thread (%u, %u, %u)",
             info->si_addr, block_index.x, block_index.y, block_index.z, thread_index.x, thread_index.y,
             thread_index.z);
    siglongjmp(escape, 1);
}

inline void run_grid(unsigned num_threads, size_t shared_bytes, Order order, int& status) {
    uint64_t num_blocks = (uint64_t)grid_dim.x * grid_dim.y * grid_dim.z;
    for (uint64_t i = 0; i < num_blocks && !status; i++) {
        uint64_t block = order == Order::DESCENDING ? num_blocks - 1 - i : i;
        block_index = {(unsigned)(block % grid_dim.x), (unsigned)(block / grid_dim.x % grid_dim.y),
                       (unsigned)(block / ((uint64_t)grid_dim.x * grid_dim.y))};
        memset(shared_memory, 0xFF, shared_bytes);
        status = run_block(num_threads, order);
    }
}

inline int launch(void (*body)(void**), void** arguments, const unsigned* grid, const unsigned* block,
                  size_t shared_bytes, unsigned order) {
    grid_dim = {grid[0], grid[1], grid[2]};
    block_dim = {block[0], block[1], block[2]};
    message[0] = 0;
    unsigned num_threads = block_dim.x * block_dim.y * block_dim.z;
    if (num_threads == 0 || num_threads > MAX_THREADS || (uint64_t)grid[0] * grid[1] * grid[2] == 0) {
        snprintf(message, sizeof message, "a block of %u threads, or an empty grid", num_threads);
        return 2;
    }
    if (!stacks)
        stacks = (unsigned char*)mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    make_thread_indices(num_threads);
    kernel_body = body;
    kernel_arguments = arguments;
    // Shared memory is right-aligned (to 16 bytes) against pages that may not be touched; so are those before it.
    size_t page = (size_t)sysconf(_SC_PAGESIZE), guard = 16 * page, used = (shared_bytes + 15) & ~(size_t)15;
    size_t inner = (used + page - 1) / page * page, mapped = inner + 2 * guard;
    unsigned char* region = (unsigned char*)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(region, guard, PROT_NONE);
    mprotect(region + guard + inner, guard, PROT_NONE);
    shared_memory = region + guard + inner - used;
    static unsigned char signal_stack[64 << 10];
    stack_t alternate = {}, previous_stack = {};
    alternate.ss_sp = signal_stack;
    alternate.ss_size = sizeof signal_stack;
    sigaltstack(&alternate, &previous_stack);
    struct sigaction action = {}, previous_segv = {}, previous_bus = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
    static int status;  // static: it must keep its value over siglongjmp
    status = 0;
    if (sigsetjmp(escape, 1) == 0)
        run_grid(num_threads, used, (Order)order, status);
    else
        status = 3;
    sigaction(SIGSEGV, &previous_segv, nullptr);
    sigaction(SIGBUS, &previous_bus, nullptr);
    sigaltstack(&previous_stack, nullptr);
    munmap(region, mapped);
    return status;
}

// ---- a table of the kernels, filled by KERNEL_ENTRY ----

struct Entry {
    const char* name;
    void (*call)(void**);
    const char* signature;  // one letter an argument: p pointer, i int, l long long, f float
};
constexpr unsigned MAX_ENTRIES = 1024;
inline Entry entries[MAX_ENTRIES];
inline unsigned num_entries;

template <class T> struct Letter;
template <class T> struct Letter<T*> { static constexpr char value = 'p'; };
template <> struct Letter<int> { static constexpr char value = 'i'; };
template <> struct Letter<long long> { static constexpr char value = 'l'; };
template <> struct Letter<float> { static constexpr char value = 'f'; };

template <int... I> struct Indices {};
template <int N, int... I> struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I> struct MakeIndices<0, I...> { using type = Indices<I...>; };
template <class T> struct Unrestricted { using type = T; };
template <class T> struct Unrestricted<T* __restrict> { using type = T*; };

template <class... A, int... I> void call_with(void (*kernel)(A...), void** a, Indices<I...>) {
    kernel(*static_cast<typename Unrestricted<A>::type*>(a[I])...);
}
template <auto Kernel> struct Caller;
template <class... A, void (*Kernel)(A...)> struct Caller<Kernel> {
    static void call(void** arguments) { call_with(Kernel, arguments, typename MakeIndices<sizeof...(A)>::type()); }
    static constexpr char signature[] = {Letter<typename Unrestricted<A>::type>::value..., 0};
};
struct Registration {
    Registration(const char* name, void (*call)(void**), const char* signature) {
        entries[num_entries++] = {name, call, signature};
    }
};

}  // namespace emulation

#define KERNEL_ENTRY(NAME)                                                                     \
    static emulation::Registration registration_##NAME(#NAME, emulation::Caller<NAME>::call, \
                                                       emulation::Caller<NAME>::signature);

extern "C" inline __attribute__((used, visibility("default"))) int emulation_count() { return (int)emulation::num_entries; }
extern "C" inline __attribute__((used, visibility("default"))) const char* emulation_name(int i) { return emulation::entries[i].name; }
extern "C" inline __attribute__((used, visibility("default"))) const char* emulation_signature(int i) { return emulation::entries[i].signature; }
extern "C" inline __attribute__((used, visibility("default"))) const char* emulation_message() { return emulation::message; }
extern "C" inline __attribute__((used, visibility("default"))) unsigned long long emulation_switches() { return emulation::num_switches; }
extern "C" inline __attribute__((used, visibility("default"))) int emulation_launch(int i, void** arguments, const unsigned* grid,
                                                                                     const unsigned* block, unsigned long shared_bytes, unsigned order) {
    return emulation::launch(emulation::entries[i].call, arguments, grid, block, shared_bytes, order);
}

// ---- CUDA's names ----

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_dim
#define gridDim emulation::grid_dim
#define __syncthreads() emulation::suspend(emulation::State::AT_BARRIER)
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::enter_collective(mask, 1, &mask, 4); }
template <class T> T emulate_shuffle(unsigned mask, T value, unsigned lane, unsigned operation) {
    emulation::enter_collective(mask, operation, &value, sizeof value);
    T result;
    memcpy(&result, emulation::read_lane(lane), sizeof result);
    emulation::leave_collective();
    return result;
}
template <class T> T __shfl_sync(unsigned mask, T value, int lane) { return emulate_shuffle(mask, value, (unsigned)lane, 2); }
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return emulate_shuffle(mask, value, (emulation::current % 32) ^ (unsigned)bits, 3);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int distance) {
    unsigned lane = emulation::current % 32;
    return emulate_shuffle(mask, value, lane < (unsigned)distance ? lane : lane - (unsigned)distance, 4);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int distance) {
    unsigned lane = emulation::current % 32;
    return emulate_shuffle(mask, value, lane + (unsigned)distance > 31 ? lane : lane + (unsigned)distance, 5);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    emulation::enter_collective(mask, 6, &predicate, sizeof predicate);
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) result |= (unsigned)((int)*emulation::read_lane(lane) != 0) << lane;
    emulation::leave_collective();
    return result;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
template <class T> T atomicAdd(T* address, T value) {
    T old = *address;
    *address = old + value;
    return old;
}
template <class T> T atomicMax(T* address, T value) {
    T old = *address;
    if (value > old) *address = value;
    return old;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
