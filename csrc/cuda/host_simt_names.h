// Names code of the library that it is compiled into, as sanitizers do: by a program that reads symbols and debug
// information. Messages of the host shim use it; where there is no such program they give the place in the file.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#pragma GCC visibility push(hidden)

namespace host_simt {

struct CodeName {
  std::string function, line;  // of a build with -g: file:line
};

inline bool is_of_shim(const std::string& place) {
  return place.find("host_simt") != std::string::npos || place.find("async_copy.h") != std::string::npos;
}

// Asks addr2line, which comes with g++: two lines for each function that was inlined there, from the innermost on. The
// place that is of use lies in none of the shim's own functions.
inline CodeName ask_addr2line(const char* file, size_t offset) {
  char place[24], function[4096] = "", line[4096] = "";
  snprintf(place, sizeof place, "0x%zx", offset);
  const std::string command = "addr2line -Cfie '" + std::string(file) + "' " + place + " 2>/dev/null";
  std::string found;
  if (FILE* const answer = popen(command.c_str(), "r")) {
    while (fgets(function, sizeof function, answer) && fgets(line, sizeof line, answer))
      if (found.empty() || is_of_shim(found)) found.assign(line, strcspn(line, "\n"));
    pclose(answer);
    found.erase(std::min(found.size(), found.find(" (discriminator")));  // of basic blocks of one line
  }
  function[strcspn(function, "\n")] = 0;
  const bool named = *function && *function != '?';
  return {named ? function : std::string(file) + "+" + place, found};
}

// Keeps its answers: a name is asked for at every launch where FASTNAS_CUDA_SYNC is set, and costs milliseconds.
inline CodeName name_of_code(const void* address) {
  static std::mutex in_use;
  static std::map<const void*, CodeName> known;
  const std::lock_guard<std::mutex> lock(in_use);
  const auto found = known.find(address);
  if (found != known.end()) return found->second;
  Dl_info info;
  if (!dladdr(address, &info)) return known[address] = {"code outside of every library", ""};
  const size_t offset = size_t(static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase));
  return known[address] = ask_addr2line(info.dli_fname, offset);
}

}  // namespace host_simt

#pragma GCC visibility pop
