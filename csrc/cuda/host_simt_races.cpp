// Finds races of CUDA kernels on the host shim. The .cu files are compiled with -fsanitize=thread -DHOST_SIMT_RACES,
// this file without the former: the calls that g++ puts in front of every load and store come here, not to libtsan.
//
// Of every 4-byte word the latest accesses are kept, with the thread that made them and when: how many block barriers
// it had passed, how many __syncwarp() and how many __threadfence(). Two accesses of one byte by two threads, one of
// them a write, are a race unless something orders them:
//   - within a block a __syncthreads(), within a warp a __syncwarp() that both lanes come to (shuffles and votes order
//     nothing, as CUDA says);
//   - between blocks an atomic on one word: the earlier access, a __threadfence() of its thread, or a barrier and the
//     fence of another thread of its block; an atomic behind that; an atomic on the same word by the other block that
//     comes later, and a __threadfence() behind it; also by way of further blocks that did the same.
// An asynchronous copy writes where it is issued and where it is waited for; nobody may touch its bytes in between.
// A launch is ordered after the one before. Found from any one schedule, as it does not matter which of the two ran
// first. Not seen: order by atomics within a block is taken for a race.
#include <cstdio>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

#include "launch.h"

#pragma GCC visibility push(hidden)

namespace host_simt::watch {
namespace {

struct Access {
  const void* code;  // the instruction behind it
  uint32_t block;    // its number, from 1; 0: none
  uint32_t barriers, syncs, fences;
  uint16_t thread;
  uint8_t bytes;  // of the word, a bit each
  Kind kind;
};

// Four are enough for a word that is not in a race: a write and readers of several warps; see note_down().
struct Word { Access accesses[4]; };
constexpr uintptr_t kPageWords = 256;

// A thread's clocks. Of its warp's lanes it has seen all that they did before their sync number seen[lane] ended.
struct Clock {
  uint32_t syncs, fences, fences_at_barrier, barriers_at_fence;
  uint32_t seen[32];
};

// What an atomic releases: of its block everything from before the barrier that preceded its thread's fence, and of
// every thread what came before the fence number fences[thread]. Then what other blocks had released to it: the first
// so many releases of other counters.
struct Counter;
struct Release {
  uint32_t block, barriers;
  std::vector<uint32_t> fences;
  std::vector<std::pair<const Counter*, size_t>> passed_on;
};
struct Counter { std::vector<Release> releases; };

// An atomic of this block, which saw the first `count` releases of a word; fenced[thread]: the thread then fenced.
struct Observation {
  const Counter* counter;
  size_t count;
  unsigned thread;
  uint32_t barriers, first_fenced;
  std::vector<bool> fenced;
};

struct Detector {
  const void* kernel;
  uint32_t block, barriers;
  std::vector<Clock> clocks;
  std::vector<Observation> observations;
  std::unordered_map<uintptr_t, std::unique_ptr<Word[]>> pages;
  std::unordered_map<const void*, Counter> counters;
  uintptr_t latest_page = 0;
  Word* latest = nullptr;
};
Detector detector;

unsigned running() { return unsigned(machine.current - machine.threads.data()); }

Word& word_at(uintptr_t number) {
  const uintptr_t page = number / kPageWords;
  if (!detector.latest || page != detector.latest_page) {
    std::unique_ptr<Word[]>& words = detector.pages[page];
    if (!words) words.reset(new Word[kPageWords]());
    detector.latest = words.get();
    detector.latest_page = page;
  }
  return detector.latest[number % kPageWords];
}

// Says whether an access is ordered before one of the first `count` releases of a counter. `own` is the counter that it
// updated itself, if it did: atomics on one word are ordered among themselves, with or without fences.
bool released_by(const Counter& counter, size_t count, const Access& a, const Counter* own) {
  for (size_t i = 0; i < count; ++i) {
    const Release& r = counter.releases[i];
    const bool by_fence = r.block == a.block && (a.barriers < r.barriers || a.fences < r.fences[a.thread]);
    if (by_fence || (r.block == a.block && &counter == own)) return true;
    for (const auto& [other, first] : r.passed_on)
      if (released_by(*other, first, a, own)) return true;
  }
  return false;
}

// Says whether an access of another block is ordered before what the running thread does.
bool released(const Access& a, const void* address) {
  const Counter* const own = a.kind == Kind::atomic ? &detector.counters[address] : nullptr;
  for (const Observation& seen : detector.observations) {
    const bool fenced = seen.fenced[running()] || seen.first_fenced < detector.barriers;
    if ((fenced || seen.counter == own) && released_by(*seen.counter, seen.count, a, own)) return true;
  }
  return false;
}

bool ordered(const Access& a, unsigned me, const void* address) {
  if (a.block != detector.block) return is_shared(address) || released(a, address);
  if (a.thread == me || a.barriers < detector.barriers) return true;
  return a.thread / 32 == me / 32 && a.syncs <= detector.clocks[me].seen[a.thread % 32];
}

void print_access(const Access& a) {
  static const char* const kinds[] = {"reads it", "writes it", "updates it atomically", "copies to it",
                                      "awaits a copy to it"};
  const unsigned b = a.block - 1, t = a.thread;
  const CodeName code = name_of_code(static_cast<const char*>(a.code) - 1);
  fprintf(stderr, "; block (%u,%u,%u) thread (%u,%u,%u) %s at %s", b % gridDim.x, b / gridDim.x % gridDim.y,
          b / gridDim.x / gridDim.y, t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y,
          kinds[int(a.kind)], code.line.c_str());
}

void report(const void* word, const Access& now, const Access& before) {
  if (machine.error) return;
  machine.error = kLaunchFailure;
  fprintf(stderr, "host_simt: race in %s: the word at %p of %s memory", name_of_code(detector.kernel).function.c_str(),
          word, is_shared(word) ? "shared" : "global");
  print_access(now);
  print_access(before);
  fprintf(stderr, "; nothing orders the two\n");
}

// Says whether an access meets a copy that has not landed, be it the own thread's. The bytes are anybody's guess then.
bool in_flight(const Access& a, const Access& now) {
  return a.kind == Kind::copy && a.block == now.block && (now.kind != Kind::landing || a.thread != now.thread);
}

bool same_moment(const Access& a, const Access& b) {
  return a.block == b.block && a.thread == b.thread && a.barriers == b.barriers && a.syncs == b.syncs &&
         a.fences == b.fences;
}

// Compares an access with those that are kept, and keeps it in place of one that it makes superfluous: whoever is
// ordered behind the new one is then ordered behind the old one too. Without one of those a read gives way.
void note_down(uintptr_t number, const Access& now) {
  const void* const address = reinterpret_cast<const void*>(number * 4);
  Access* place = nullptr;
  Word& word = word_at(number);
  for (Access& a : word.accesses)
    if (a.kind == now.kind && !(now.bytes & ~a.bytes) && same_moment(a, now)) return;
  for (Access& a : word.accesses) {
    const bool is_free = !a.block;
    const bool before = is_free || (ordered(a, now.thread, address) && !in_flight(a, now));
    const bool harmless = a.kind == now.kind && (a.kind == Kind::read || a.kind == Kind::atomic);
    if (!before && (a.bytes & now.bytes) && !harmless) return report(address, now, a);
    if (is_free ? !place : before && !(a.bytes & ~now.bytes) && (now.kind != Kind::read || a.kind == Kind::read))
      place = &a;
  }
  static unsigned turn = 0;
  for (unsigned i = 0; !place && i < 4; ++i)
    if (Access& a = word.accesses[++turn % 4]; a.kind == Kind::read) place = &a;
  *(place ? place : &word.accesses[++turn % 4]) = now;
}

bool is_private(const void* address) {
  const char* const byte = static_cast<const char*>(address);
  return byte >= machine.stacks && byte < machine.stacks + kMaxThreads * kStackBytes;
}

void note(const void* address, size_t bytes, Kind kind, const void* code) {
  const Watch shim(false);
  const unsigned me = running();
  const Clock& clock = detector.clocks[me];
  Access now{code, detector.block, detector.barriers, clock.syncs, clock.fences, uint16_t(me), 0, kind};
  const uintptr_t first = reinterpret_cast<uintptr_t>(address), end = first + bytes;
  for (uintptr_t number = first / 4; number * 4 < end; ++number) {
    const uintptr_t low = std::max(first, number * 4) - number * 4, high = std::min(end, number * 4 + 4) - number * 4;
    now.bytes = uint8_t((1u << high) - (1u << low));
    note_down(number, now);
  }
}

// Notes down what g++ announces, where it is a kernel's and not on the thread's own stack. The shim announces itself
// while it sets `watching`.
void note_if_watched(const void* address, size_t bytes, Kind kind, const void* code) {
  if (watching && !is_private(address) && address != &watching) note(address, bytes, kind, code);
}

}  // namespace

void launch_begins(const void* kernel) {
  detector.kernel = kernel;
  detector.pages.clear();
  detector.counters.clear();
  detector.latest = nullptr;
}

void block_begins() {
  detector.block = 1 + (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  detector.barriers = 1;
  detector.clocks.assign(machine.threads.size(), {1, 0, 0, 0, {}});
  detector.observations.clear();
}

void block_barrier_opens() {
  ++detector.barriers;
  for (Clock& clock : detector.clocks) clock.fences_at_barrier = clock.fences;
}

void warp_barrier_opens(unsigned first_thread, unsigned lanes) {
  uint32_t seen[32] = {};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    Clock& clock = detector.clocks[first_thread + lane];
    clock.seen[lane] = clock.syncs++;
    for (unsigned other = 0; other < 32; ++other) seen[other] = std::max(seen[other], clock.seen[other]);
  }
  for (unsigned lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) std::copy_n(seen, 32, detector.clocks[first_thread + lane].seen);
}

void fence() {
  const Watch shim(false);
  const unsigned me = running();
  Clock& clock = detector.clocks[me];
  ++clock.fences;
  clock.barriers_at_fence = detector.barriers;
  for (Observation& seen : detector.observations) {
    if (seen.thread != me && seen.barriers == detector.barriers) continue;
    seen.fenced[me] = true;
    seen.first_fenced = std::min(seen.first_fenced, detector.barriers);
  }
}

void atomic(const void* word) {
  note(word, 4, Kind::atomic, __builtin_return_address(0));
  const Watch shim(false);
  const unsigned me = running();
  Counter& counter = detector.counters[word];
  Release release{detector.block, detector.clocks[me].barriers_at_fence, {}, {}};
  for (const Clock& clock : detector.clocks) release.fences.push_back(clock.fences_at_barrier);
  release.fences[me] = detector.clocks[me].fences;
  for (const Observation& seen : detector.observations)  // those of this counter come before this atomic anyway
    if (seen.counter != &counter && (seen.fenced[me] || seen.first_fenced < release.barriers))
      release.passed_on.push_back({seen.counter, seen.count});
  detector.observations.push_back({&counter, counter.releases.size(), me, detector.barriers, ~0u,
                                   std::vector<bool>(detector.clocks.size())});
  counter.releases.push_back(std::move(release));
}

void access(const void* address, size_t bytes, Kind kind) { note(address, bytes, kind, __builtin_return_address(0)); }

}  // namespace host_simt::watch

// What g++ calls, by the size of what is accessed.
#define NOTE(name, bytes, kind)                                                                        \
  void __tsan_##name(void* address) {                                                                  \
    host_simt::watch::note_if_watched(address, bytes, host_simt::watch::Kind::kind, __builtin_return_address(0)); \
  }
#define NOTE_SIZE(bytes) NOTE(read##bytes, bytes, read) NOTE(write##bytes, bytes, write)
#define NOTE_UNALIGNED(bytes) NOTE(unaligned_read##bytes, bytes, read) NOTE(unaligned_write##bytes, bytes, write)

extern "C" {
NOTE_SIZE(1)
NOTE_SIZE(2)
NOTE_SIZE(4)
NOTE_SIZE(8)
NOTE_SIZE(16)
NOTE_UNALIGNED(2)
NOTE_UNALIGNED(4)
NOTE_UNALIGNED(8)
NOTE_UNALIGNED(16)
void __tsan_read_range(void* address, unsigned long bytes) {
  host_simt::watch::note_if_watched(address, bytes, host_simt::watch::Kind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  host_simt::watch::note_if_watched(address, bytes, host_simt::watch::Kind::write, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// Guards of static variables: of the shim, not of kernels.
unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) {
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
}

#pragma GCC visibility pop
