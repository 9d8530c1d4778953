// What the host shim tells the race detector (host_simt_races.cpp). Without HOST_SIMT_RACES nobody listens.
#pragma once

#include <cstddef>

#pragma GCC visibility push(hidden)

namespace host_simt::watch {

enum class Kind : unsigned char { read, write, atomic, copy, landing };  // copy: asynchronous, until its landing

#if defined(HOST_SIMT_RACES)

void launch_begins(const void* kernel);
void block_begins();
void block_barrier_opens();
void warp_barrier_opens(unsigned first_thread, unsigned lanes);
void fence();
void atomic(const void* word);  // of the running thread, to a word that others update in the same way
void access(const void* address, size_t bytes, Kind kind);

// Says whether accesses are those of a kernel: while a fiber runs, but not while it runs the shim's own code.
inline bool watching = false;

// Sets `watching` for a scope. g++ announces accesses after it has ordered them, hence the walls against that.
class Watch {
 public:
  explicit Watch(bool now) : before_(watching) { set(now); }
  ~Watch() { set(before_); }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

 private:
  static void set(bool now) {
    asm volatile("" ::: "memory");
    watching = now;
    asm volatile("" ::: "memory");
  }
  bool before_;
};

#else

inline void launch_begins(const void*) {}
inline void block_begins() {}
inline void block_barrier_opens() {}
inline void warp_barrier_opens(unsigned, unsigned) {}
inline void fence() {}
inline void atomic(const void*) {}
inline void access(const void*, size_t, Kind) {}
struct Watch {
  explicit Watch(bool) {}
};

#endif

}  // namespace host_simt::watch

#pragma GCC visibility pop
