// A bounded, recycled home for torch's CPU tensors.
//
// torch takes tensor memory from posix_memalign and gives it back through free. `install` redirects both to one
// region of fixed size: posix_memalign in libc10.so only, free in libtorch_cpu.so and libtorch_python.so too. What is
// freed is reused at once by the next tensor, so the memory of the process neither grows step by step nor has to be
// zeroed again by the kernel.
//
// A second region lies in a file. What a thread allocates while it asks for that comes from there: the kernel writes it to the
// disk, and reads it back, as it needs memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include <nanobind/nanobind.h>

namespace arena {

// All blocks start and end on a page: free ranges can be handed back exactly, and a foreign pointer is told at a glance.
inline constexpr std::size_t kPageBytes = 4096;
inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

// One contiguous mapping, cut into blocks. First fit in address order: temporaries from the low end, long-lived blocks
// from the high end; neighbours merge the moment they are free. Not thread-safe; the caller holds the lock.
class Region {
public:
    explicit Region(std::size_t capacity_bytes);  // throws std::bad_alloc
    Region(std::size_t capacity_bytes, int file);  // in that much of the file, of which it keeps a descriptor of its own
    ~Region();
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    void* allocate(std::size_t bytes, bool high_end);  // nullptr when no free range is large enough
    std::size_t release(void* block);                  // bytes of the block; 0 when it is no block of this region
    void trim();                                       // hands the pages of free ranges to the kernel
    void discard(void* block, std::size_t bytes);      // hands these pages to the kernel; of a file, they need not be written
    int file() const { return file_; }

    bool contains(const void* p) const;
    std::uintptr_t begin() const { return reinterpret_cast<std::uintptr_t>(base_); }
    std::uintptr_t end() const { return begin() + capacity_bytes_; }
    std::size_t capacity_bytes() const { return capacity_bytes_; }
    std::size_t used_bytes() const { return used_bytes_; }
    std::size_t extent_bytes() const { return low_mark_ + (capacity_bytes_ - high_mark_); }
    std::size_t blocks() const { return used_.size(); }
    std::size_t largest_free_bytes() const;

private:
    int file_ = -1;  // -1: memory
    char* base_ = nullptr;
    std::size_t capacity_bytes_ = 0;
    std::size_t used_bytes_ = 0;
    std::size_t low_mark_ = 0;   // end of the highest block ever taken from the low end
    std::size_t high_mark_ = 0;  // start of the lowest block ever taken from the high end
    std::map<std::size_t, std::size_t> free_;            // offset -> bytes, never two neighbours
    std::unordered_map<std::size_t, std::size_t> used_;  // offset -> bytes
};

struct Stats {
    std::size_t capacity_bytes = 0;
    std::size_t used_bytes = 0;
    std::size_t peak_bytes = 0;
    std::size_t extent_bytes = 0;
    std::size_t largest_free_bytes = 0;
    std::size_t blocks = 0;
    std::size_t overflow_bytes = 0;
    std::size_t overflow_peak_bytes = 0;
};

// Throws std::runtime_error naming what is missing when torch's allocator cannot be redirected on this system.
void install(std::size_t capacity_bytes, std::size_t min_block_bytes);
Stats stats();
void reset_peak();
bool set_long_lived(bool on);  // of the calling thread; returns what it was

// From now on blocks can lie in `bytes` of this file; -1: in none. Throws std::runtime_error.
void map_file(int file, std::size_t bytes);
// The calling thread's blocks of that many bytes and more lie in the file, as far as it has room; 0: none. Returns what it was.
std::size_t set_in_file(std::size_t min_bytes);
std::size_t bytes_in_file();                               // of blocks now
std::size_t bytes_beside_file();                           // of blocks that it has had no room for, since it was opened
void let_go(std::uintptr_t address, std::size_t bytes);    // a part of a block in the file: is not wanted for a while
void fetch_soon(std::uintptr_t address, std::size_t bytes);
int file_error();  // errno of writing to the file, which has failed since it was asked last; 0: it has not

}  // namespace arena

void register_arena(nanobind::module_& m);
