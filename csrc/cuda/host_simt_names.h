// Names code of the library that it is compiled into, as sanitizers do: by a program that reads symbols and debug
// information. Messages of the host shim use it; where there is no such program they give the place in the file.
#pragma once

#include <dlfcn.h>

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

// Asks addr2line, which comes with g++: the function on the first line, the place on the second.
inline CodeName ask_addr2line(const char* file, size_t offset) {
  char place[24];
  snprintf(place, sizeof place, "0x%zx", offset);
  const std::string command = "addr2line -Cfe '" + std::string(file) + "' " + place + " 2>/dev/null";
  char text[2][4096] = {};
  if (FILE* const answer = popen(command.c_str(), "r")) {
    for (char* line : {text[0], text[1]})
      if (fgets(line, sizeof text[0], answer)) line[strcspn(line, "\n")] = 0;
    pclose(answer);
  }
  const bool named = *text[0] && *text[0] != '?';
  return {named ? text[0] : std::string(file) + "+" + place, text[1]};
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
