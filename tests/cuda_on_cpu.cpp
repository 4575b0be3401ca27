// Executes CUDA kernels on the CPU (tests/cuda_on_cpu.h), and looks at every access to memory.
//
// The kernel files are compiled with -fsanitize=thread, whose calls at each load and store come
// here instead of to ThreadSanitizer. By them is counted what each kernel moves, and a kernel ends
// with an error where
//   - two threads access the same bytes, one of them writes, and neither __syncthreads nor
//     __syncwarp stands between the two (blocks have no order at all),
//   - shared memory is read that nothing has written, or accessed beside its arrays,
//   - an address is not a multiple of the size of what is loaded or stored,
//   - shared memory is accessed while a copy to it is under way: copies land when they are waited
//     for, at the latest possible time.
// In other builds nothing calls them: AddressSanitizer and ThreadSanitizer look for themselves. The
// latter, with ON_CPU_TSAN, is told that each thread is one, a fiber, and that barriers alone order
// what they do.

#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#error "the switch between threads is written for x86-64"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Keeps this thread's registers on its stack, and goes on where another was left.
extern "C" void on_cpu_switch(void** left, void* other);
asm(R"(
.text
.type on_cpu_switch, @function
on_cpu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size on_cpu_switch, .-on_cpu_switch
)");

#if defined(ON_CPU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* place);
void __tsan_release(void* place);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
void __tsan_read_range(void* p, unsigned long bytes);
void __tsan_write_range(void* p, unsigned long bytes);
int __tsan_atomic32_fetch_add(volatile int* p, int x, int order);
}
#endif

// Where this library lies in memory: what is there is not the GPU's.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start, _end;

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_cpu {
namespace {

constexpr int kMaxThreads = 1024, kLanes = 32, kGap = 64;
constexpr int64_t kStackBytes = 1 << 16, kArenaBytes = 128 * 1024, kFrameBytes = 1 << 16;

enum class State { kReady, kBarrier, kCollective, kDone };

// Of copy_async, under way.
struct Copy {
  char* to;
  const char* from;
  bool valid;
  int group;
};

struct Thread {
  void* stack_pointer;
  State state;
  dim3 index;
  int line;  // where it waits
  uint32_t mask;
  Join join;
  const void* given;
  void* taken;
  uint32_t num_barriers, num_warp_barriers;
  std::vector<Copy> copies;
  int num_groups;  // of copies that it has committed
  void* fiber;     // ThreadSanitizer's; null: not seen
};

struct Array {
  std::string key;
  char* begin;
  int64_t bytes;
};

// Blocks are numbered over all launches.
struct Access {
  uint32_t block = 0;
  uint16_t thread = 0;
  bool atomic = false;
  uint32_t num_barriers = 0, num_warp_barriers = 0;
};

struct Cell {
  Access writer, readers[2];  // of the readers the last two that differ
};

struct Count {
  int64_t launches = 0, read_bytes = 0, written_bytes = 0, mmas = 0;
};

// Two bytes of memory have a cell.
constexpr uintptr_t kCellBytes = 2, kPageBytes = 4096;

constexpr int64_t kCopyBytes = 16;  // cp.async

Thread threads[kMaxThreads];
Thread* current;  // null: the host
bool in_runtime;  // what it does itself, by templates that a kernel file may have too, is not seen
int num_threads;
void* scheduler;
char *stacks, *arena, *frame;
std::vector<Array> arrays;
int64_t arena_used, dynamic_bytes;
void (*thread_function)(const void*);
const void* thread_context;
std::string failure;

enum class Order { kAscending, kDescending, kRandom };
Order order;
std::mt19937 generator;

uint32_t block_number, first_block_of_launch;
std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages;
Cell shared_cells[kArenaBytes / kCellBytes];
bool under_way[kArenaBytes / kCellBytes];  // a copy to this cell
std::map<std::string, Count> counts;
Count* count;

#if defined(ON_CPU_TSAN)
void* host_fiber;
char end_of_launch;
void switch_to_fiber(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }  // 1: without an order
#endif

std::string text(const dim3& index) {
  std::ostringstream text;
  text << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return text.str();
}

void switch_to(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
#if defined(ON_CPU_TSAN)
  if (thread.fiber) switch_to_fiber(thread.fiber);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  const char* stack = stacks + (&thread - threads) * kStackBytes;
  __sanitizer_start_switch_fiber(&fake_stack, stack, kStackBytes);
#endif
  on_cpu_switch(&scheduler, thread.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

#if defined(__SANITIZE_ADDRESS__)
const void* host_stack;
size_t host_stack_bytes;
#endif

// The thread goes on when its state is kReady again.
void wait(State state, int line) {
  Thread& thread = *current;
  thread.state = state;
  thread.line = line;
#if defined(ON_CPU_TSAN)
  if (thread.fiber) switch_to_fiber(host_fiber);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, host_stack, host_stack_bytes);
#endif
  on_cpu_switch(&thread.stack_pointer, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &host_stack, &host_stack_bytes);
#endif
}

void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  thread_function(thread_context);
  if (!current->copies.empty()) fail("a thread ends without waiting for its copies");
#if defined(ON_CPU_TSAN)
  if (current->fiber) __tsan_release(&end_of_launch);
#endif
  wait(State::kDone, 0);
}

void prepare(Thread& thread, int i) {
  char* stack = stacks + i * kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);
#endif
  // As if thread_main had been called, and had called on_cpu_switch.
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(&thread_main);
  std::fill(top - 8, top - 2, nullptr);
  thread = {};
  thread.stack_pointer = top - 8;
  thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
}

// The lowest, the highest or any of the first `size` numbers.
int choose(int size) {
  if (order == Order::kAscending) return 0;
  return order == Order::kDescending ? size - 1 : generator() % size;
}

std::vector<int> all_in_order(int first, int size) {
  std::vector<int> numbers(size);
  std::iota(numbers.begin(), numbers.end(), first);
  if (order == Order::kDescending) std::reverse(numbers.begin(), numbers.end());
  if (order == Order::kRandom) std::shuffle(numbers.begin(), numbers.end(), generator);
  return numbers;
}

// Whether every lane of the mask has come to the same collective; then it is over.
bool finish_collective(Thread* warp, int num_lanes, const Thread& first) {
  uint32_t lanes = 0;
  const void* given[kLanes];
  void* taken[kLanes];
  for (int lane = 0; lane < num_lanes; ++lane) {
    const Thread& thread = warp[lane];
    if (!(first.mask >> lane & 1) || thread.state == State::kDone) continue;
    if (thread.state != State::kCollective || thread.mask != first.mask) return false;
    if (thread.join != first.join || thread.line != first.line) {
      fail("lanes of a warp are in different collectives, in lines " + std::to_string(first.line) +
           " and " + std::to_string(thread.line));
    }
    lanes |= 1u << lane;
    given[lane] = thread.given;
    taken[lane] = thread.taken;
  }
  if (first.join) first.join(lanes, given, taken);
  for (int lane = 0; lane < num_lanes; ++lane) {
    if (lanes >> lane & 1) {
      warp[lane].state = State::kReady;
      warp[lane].num_warp_barriers += first.join == nullptr;
    }
  }
  return true;
}

// Runs a warp's threads until each waits for something; false if all did already.
bool advance(int warp) {
  const int first = warp * kLanes, size = std::min(kLanes, num_threads - first);
  bool any = false;
  for (int i : all_in_order(first, size)) {
    if (threads[i].state != State::kReady) continue;
    any = true;
    switch_to(threads[i]);
    if (!failure.empty()) throw std::runtime_error(failure);
  }
  for (int i = first; i < first + size && !any; ++i) {
    if (threads[i].state == State::kCollective) {
      any = finish_collective(threads + first, size, threads[i]);
    }
  }
  return any;
}

void finish_barrier() {
  const Thread& first = threads[0];
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = threads[i];
    if (thread.state == State::kCollective) {
      fail("thread " + text(thread.index) + " waits in line " + std::to_string(thread.line) +
           " for lanes that do not come");
    }
    if (thread.state != first.state || thread.line != first.line) {
      fail("threads are at different barriers: " + text(first.index) + " in line " +
           std::to_string(first.line) + ", " + text(thread.index) + " in line " +
           std::to_string(thread.line) + " (0: at the end)");
    }
  }
  for (int i = 0; i < num_threads && first.state != State::kDone; ++i) {
    threads[i].state = State::kReady;
    ++threads[i].num_barriers;
  }
}

char* new_memory(int64_t bytes) {
  return static_cast<char*>(mmap(
      nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

// A stack that is too small ends the process, and not in another's data.
char* new_stacks(int64_t count) {
  char* const memory = new_memory(count * kStackBytes);
  for (int64_t i = 0; i < count; ++i) mprotect(memory + i * kStackBytes, kPageBytes, PROT_NONE);
  return memory;
}

#if defined(ON_CPU_TSAN)
constexpr int64_t kPlacesBytes = 4096;
constexpr uint32_t kSeenBlocks = 2;  // of a launch: a fiber takes a millisecond
int64_t* places;

// What the others do before they come to a barrier is done before this thread goes on. A place is
// the block's or a warp's. Each has two, in turn: nobody is two barriers ahead.
template <class Wait>
void wait_in_order(int place, uint32_t num_before, const Wait& wait) {
  int64_t* const p = places + 2 * place + num_before % 2;
  const bool seen = current->fiber;
  if (seen) __tsan_release(p);
  wait();
  if (seen) __tsan_acquire(p);
}

// Blocks have no order: nothing is theirs that was another's before.
void begin_block() {
  stacks = new_stacks(num_threads);
  arena = new_memory(kArenaBytes);
  places = reinterpret_cast<int64_t*>(new_memory(kPlacesBytes));
  for (int i = 0; i < num_threads; ++i) {
    prepare(threads[i], i);
    const bool seen = block_number < first_block_of_launch + kSeenBlocks;
    threads[i].fiber = seen ? __tsan_create_fiber(0) : nullptr;
  }
}
void end_block() {
  for (int i = 0; i < num_threads; ++i) {
    if (threads[i].fiber) __tsan_destroy_fiber(threads[i].fiber);
  }
  munmap(stacks, num_threads * kStackBytes);
  munmap(arena, kArenaBytes);
  munmap(places, kPlacesBytes);
}
#else
void begin_block() {
  if (!stacks) {
    stacks = new_stacks(kMaxThreads);
    arena = new_memory(kArenaBytes);
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(arena, kArenaBytes);
#endif
  for (int i = 0; i < num_threads; ++i) prepare(threads[i], i);
}
void end_block() {}
#endif

void run_block() {
  ++block_number;
  arrays.clear();
  arena_used = kGap;
  begin_block();
  while (threads[0].state != State::kDone) {
    std::vector<int> warps((num_threads + kLanes - 1) / kLanes);
    std::iota(warps.begin(), warps.end(), 0);
    while (!warps.empty()) {
      const auto warp = warps.begin() + choose(warps.size());
      if (!advance(*warp)) warps.erase(warp);
    }
    finish_barrier();
  }
  end_block();
}

std::string name_of_kernel(const std::string& start) {
  const size_t begin = start.find("kKernel = "), end = start.find(";", begin);
  std::string name = start.substr(begin, end - begin);
  for (const std::string part : {"kKernel = ", "mixlora::", "{anonymous}::"}) {
    for (size_t at; (at = name.find(part)) != std::string::npos;) name.erase(at, part.size());
  }
  return name;
}

int64_t cell_behind(int64_t bytes) { return (bytes + kCellBytes - 1) / kCellBytes; }

#if defined(ON_CPU_TSAN)
struct InRuntime {
  InRuntime() { __tsan_ignore_thread_begin(); }
  ~InRuntime() { __tsan_ignore_thread_end(); }
};

void enter(void* p, int64_t bytes, bool write) {
  write ? __tsan_write_range(p, bytes) : __tsan_read_range(p, bytes);
}
#else
Access this_access(bool atomic) {
  return {block_number,
          static_cast<uint16_t>(current - threads),
          atomic,
          current->num_barriers,
          current->num_warp_barriers};
}

bool same_thread(const Access& a, const Access& b) {
  return a.block == b.block && a.thread == b.thread;
}

bool ordered(const Access& before, const Access& now) {
  if (before.block < first_block_of_launch || same_thread(before, now)) return true;
  if (before.block != now.block) return false;
  if (now.num_barriers > before.num_barriers) return true;
  const bool same_warp = before.thread / kLanes == now.thread / kLanes;
  return same_warp && now.num_warp_barriers > before.num_warp_barriers;
}

void check_order(const char* what, const Access& before, const Access& now) {
  if (ordered(before, now) || (before.atomic && now.atomic)) return;
  fail(std::string(what) + " is not ordered after an access by thread " +
       text(threads[before.thread].index) + (before.block == now.block ? "" : " of another block"));
}

// Whether this block is the first time at the cell, as a reader or as a writer.
bool enter(Cell& cell, bool write, bool atomic) {
  const Access now = this_access(atomic);
  check_order(write ? "a store" : "a load", cell.writer, now);
  if (write) {
    for (const Access& reader : cell.readers) check_order("a store", reader, now);
    return std::exchange(cell.writer, now).block != now.block;
  }
  const Access before = cell.readers[0];
  if (!same_thread(before, now)) cell.readers[1] = before;
  cell.readers[0] = now;
  return before.block != now.block;
}

void enter_shared(char* p, int64_t bytes, bool write, bool atomic) {
  const auto around = [&](const Array& x) {
    return x.begin <= p && p + bytes <= x.begin + x.bytes;
  };
  if (std::none_of(arrays.begin(), arrays.end(), around)) fail("beside a shared array");
  for (int64_t i = (p - arena) / kCellBytes; i < cell_behind(p + bytes - arena); ++i) {
    Cell& cell = shared_cells[i];
    if (!write && cell.writer.block != block_number) fail("a load of unwritten shared memory");
    if (under_way[i]) fail("a copy to this shared memory has not been waited for");
    enter(cell, write, atomic);
  }
}

Cell* cells_of(uintptr_t page) {
  static uintptr_t last_page;
  static Cell* last_cells;
  if (page == last_page) return last_cells;
  auto& cells = pages[page];
  if (!cells) cells = std::make_unique<Cell[]>(kPageBytes / kCellBytes);
  last_page = page;
  return last_cells = cells.get();
}

void enter_global(uintptr_t p, int64_t bytes, bool write, bool atomic) {
  for (uintptr_t at = p / kCellBytes * kCellBytes; at < p + bytes; at += kCellBytes) {
    Cell& cell = cells_of(at / kPageBytes)[at % kPageBytes / kCellBytes];
    if (enter(cell, write, atomic)) {
      (write ? count->written_bytes : count->read_bytes) += std::min<int64_t>(bytes, kCellBytes);
    }
  }
}

struct InRuntime {
  InRuntime() { in_runtime = true; }
  ~InRuntime() { in_runtime = false; }
};

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAllIsSeen = false;
#else
constexpr bool kAllIsSeen = true;
#endif

void enter(void* p, int64_t bytes, bool write, bool atomic = false) {
  if (!current || in_runtime || !kAllIsSeen) return;
  const InRuntime guard;
  char* const address = static_cast<char*>(p);
  const auto within = [&](const char* begin, int64_t size) {
    return begin <= address && address < begin + size;
  };
  if (within(stacks, kMaxThreads * kStackBytes) || within(frame, kFrameBytes)) return;
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0) check_aligned(p, bytes);
  if (within(arena, kArenaBytes)) return enter_shared(address, bytes, write, atomic);
  if (within(&__ehdr_start, &_end - &__ehdr_start)) return;
  enter_global(reinterpret_cast<uintptr_t>(p), bytes, write, atomic);
}
#endif

}  // namespace

// The block ends; in a collective's join, which the host runs, by an exception.
void fail(const std::string& message) {
  if (!current) throw std::runtime_error(message);
  in_runtime = true;
  failure = message + ", thread " + text(threadIdx);
  wait(State::kDone, 0);
  __builtin_unreachable();
}

void collective(uint32_t mask, int line, Join join, const void* given, void* taken) {
  if (!(mask >> lane() & 1)) fail("the mask is without the lane, line " + std::to_string(line));
  current->mask = mask;
  current->join = join;
  current->given = given;
  current->taken = taken;
  wait(State::kCollective, line);
}

// All threads of a block that come to one line get one array; it holds what is NaN in every type.
void* shared_array(const char* file, int line, int64_t bytes) {
  const InRuntime guard;
  const std::string key = file + (":" + std::to_string(line));
  for (const Array& array : arrays) {
    if (array.key == key) return array.begin;
  }
  char* begin = arena + (arena_used + kGap - 1) / kGap * kGap;
  arena_used = begin + bytes + kGap - arena;
  if (arena_used > kArenaBytes) fail("too much shared memory");
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(begin, bytes);
#endif
  std::fill_n(begin, bytes, 0xff);
  std::fill_n(shared_cells + (begin - arena) / kCellBytes, cell_behind(bytes), Cell{});
  std::fill_n(under_way + (begin - arena) / kCellBytes, cell_behind(bytes), false);
  arrays.push_back({key, begin, bytes});
  return begin;
}

// `bytes` is a power of two.
void check_aligned(const void* p, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) {
    fail("an address is no multiple of " + std::to_string(bytes));
  }
}

void* dynamic_shared() { return shared_array("dynamic", 0, dynamic_bytes); }

void check_shared(const void* p, const char* what) {
  const char* address = static_cast<const char*>(p);
  if (address < arena || arena + kArenaBytes <= address) fail(std::string(what) + " shared memory");
}

// Until it lands, there is NaN, and nothing may look at it.
void copy_async(void* to, const void* from, bool valid) {
  check_aligned(to, kCopyBytes);
  check_shared(to, "a copy's target is not in");
  if (valid) check_aligned(from, kCopyBytes);
  enter(to, kCopyBytes, true);
  if (valid) enter(const_cast<void*>(from), kCopyBytes, false);
  const InRuntime guard;
  memset(to, 0xff, kCopyBytes);
  char* const begin = static_cast<char*>(to);
  std::fill_n(under_way + (begin - arena) / kCellBytes, kCopyBytes / kCellBytes, true);
  current->copies.push_back({begin, static_cast<const char*>(from), valid, current->num_groups});
}

void commit_copies() { ++current->num_groups; }

void wait_for_copies(int groups) {
  std::vector<Copy> landing;
  {
    const InRuntime guard;
    const auto waits = [&](const Copy& copy) { return copy.group >= current->num_groups - groups; };
    std::vector<Copy>& copies = current->copies;
    const auto first = std::partition_point(copies.begin(), copies.end(), std::not_fn(waits));
    landing.assign(copies.begin(), first);
    copies.erase(copies.begin(), first);
  }
  for (const Copy& copy : landing) {
    std::fill_n(under_way + (copy.to - arena) / kCellBytes, kCopyBytes / kCellBytes, false);
    enter(copy.to, kCopyBytes, true);
    if (copy.valid) {
      memcpy(copy.to, copy.from, kCopyBytes);
    } else {
      memset(copy.to, 0, kCopyBytes);
    }
  }
}

void read_shared(void* to, const void* from, int64_t bytes) {
  check_aligned(from, bytes);
  check_shared(from, "ldmatrix reads what is not in");
  enter(const_cast<void*>(from), bytes, false);
  memcpy(to, from, bytes);
}

void count_mma() { ++count->mmas; }

int atomic_add(int* p, int x) {
#if defined(ON_CPU_TSAN)
  return __tsan_atomic32_fetch_add(p, x, __ATOMIC_RELAXED);
#else
  enter(p, sizeof(int), true, true);
  return std::exchange(*p, *p + x);
#endif
}

void run(const std::string& start,
         dim3 grid,
         dim3 block,
         int64_t shared_bytes,
         std::string& error,
         void (*thread)(const void*),
         const void* context) {
  const int64_t num_blocks = int64_t{1} * grid.x * grid.y * grid.z;
  const int64_t size = int64_t{1} * block.x * block.y * block.z;
  const bool fits = grid.x < 1u << 31 && grid.y < 1 << 16 && grid.z < 1 << 16 && block.z <= 64;
  if (!fits || num_blocks < 1 || size < 1 || size > kMaxThreads) {
    error = "invalid configuration argument";
    return;
  }
  frame = static_cast<char*>(__builtin_frame_address(0));
  gridDim = grid;
  blockDim = block;
  num_threads = size;
  dynamic_bytes = shared_bytes;
  thread_function = thread;
  thread_context = context;
  const std::string name = name_of_kernel(start);
  count = &counts[name];
  ++count->launches;
  first_block_of_launch = block_number + 1;
  failure.clear();
  in_runtime = false;
#if defined(ON_CPU_TSAN)
  host_fiber = __tsan_get_current_fiber();
  const InRuntime guard;  // what the threads do is seen, what the host does for them is not
#endif
  try {
    for (int64_t b : all_in_order(0, num_blocks)) {
      blockIdx = {static_cast<unsigned>(b % grid.x),
                  static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      run_block();
    }
  } catch (const std::runtime_error& failed) {
    error = name + ", block " + text(blockIdx) + ": " + failed.what();
  }
#if defined(ON_CPU_TSAN)
  __tsan_acquire(&end_of_launch);
#endif
}

}  // namespace on_cpu

#if defined(ON_CPU_TSAN)
void __syncthreads(int line) {
  using namespace on_cpu;
  wait_in_order(0, current->num_barriers, [&] { wait(State::kBarrier, line); });
}
void __syncwarp(uint32_t mask, int line) {
  using namespace on_cpu;
  wait_in_order(1 + (current - threads) / kLanes, current->num_warp_barriers, [&] {
    collective(mask, line, nullptr, nullptr, nullptr);
  });
}
#else
void __syncthreads(int line) { on_cpu::wait(on_cpu::State::kBarrier, line); }
void __syncwarp(uint32_t mask, int line) {
  on_cpu::collective(mask, line, nullptr, nullptr, nullptr);
}
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void on_cpu_set_order(int order, unsigned seed) {
  on_cpu::order = static_cast<on_cpu::Order>(order);
  on_cpu::generator.seed(seed);
}

// "<kernel>\t<launches>\t<bytes read>\t<bytes written>\t<mma>\n" of each kernel since the last
// call. What a block accesses again is not counted again.
EXPORT const char* on_cpu_counts() {
  static std::string said;
  std::ostringstream lines;
  for (const auto& [kernel, count] : on_cpu::counts) {
    lines << kernel << "\t" << count.launches << "\t" << count.read_bytes << "\t"
          << count.written_bytes << "\t" << count.mmas << "\n";
  }
  on_cpu::counts.clear();
  return (said = lines.str()).c_str();
}

#if !defined(ON_CPU_TSAN)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, long bytes) { on_cpu::enter(p, bytes, false); }
void __tsan_write_range(void* p, long bytes) { on_cpu::enter(p, bytes, true); }

#define HOOKS(bytes)                                                             \
  void __tsan_read##bytes(void* p) { on_cpu::enter(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { on_cpu::enter(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { on_cpu::enter(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { on_cpu::enter(p, bytes, true); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
}
#endif
