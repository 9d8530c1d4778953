// Asynchronous copies on the host shim (async_copy.h). Included by host_simt.h only.
#pragma once

#include "host_simt_machine.h"

#pragma GCC visibility push(hidden)

// What tells the race detector of an access is inlined, so that it is found at the kernel's line.
namespace host_simt {

// Notes down a copy of the running thread; it lands in land_copies(), the latest moment that the hardware may choose.
__attribute__((always_inline)) inline void copy_async(void* to, const void* from, unsigned bytes, const char* file,
                                                      int line) {
  watch::access(to, bytes, watch::Kind::copy);
  if (from) watch::access(from, bytes, watch::Kind::read);
  const watch::Watch shim(false);
  Thread& self = *machine.current;
  self.op.file = file;
  self.op.line = line;
  if (!is_shared(to)) fail("asynchronous copy to what is not shared memory", self, self);
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("misaligned asynchronous copy", self, self, kMisalignedAddress);
  if (!machine.error) self.copies.push_back({to, from, bytes, self.groups});
}

inline void commit_copies() {
  const watch::Watch shim(false);
  ++machine.current->groups;
}

// Lands the running thread's copies, but for those of the last groups and those that belong to none yet.
__attribute__((always_inline)) inline void land_copies(unsigned pending) {
  const watch::Watch shim(false);
  Thread& self = *machine.current;
  size_t landed = 0;
  for (; landed < self.copies.size() && self.copies[landed].group + pending < self.groups; ++landed) {
    const Copy& copy = self.copies[landed];
    watch::access(copy.to, copy.bytes, watch::Kind::landing);
    if (copy.from) watch::access(copy.from, copy.bytes, watch::Kind::read);
    if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
    else memset(copy.to, 0, copy.bytes);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + ptrdiff_t(landed));
}

}  // namespace host_simt

#pragma GCC visibility pop
