// An open file with up to two descriptors: one that bypasses the page cache and one that does not.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace io {

// O_DIRECT wants offset, length and address aligned to the logical block, which is at most a page on current disks.
// A file system that wants more answers EINVAL, and the file is read through the page cache from then on.
constexpr uint64_t kAlignment = 4096;

inline uint64_t align_down(uint64_t value) { return value & ~(kAlignment - 1); }
inline uint64_t align_up(uint64_t value) { return align_down(value + kAlignment - 1); }

struct File {
    std::string path;
    bool writable = false;
    int buffered_fd = -1;
    int direct_fd = -1;             // -1: this file system has no O_DIRECT
    std::atomic<bool> direct{false};  // cleared when a direct transfer is refused with EINVAL
    int table_slot = -1;            // place of the pair (buffered, direct) in the ring's file table, -1: not registered
    uint64_t pending = 0;           // extents of unfinished tickets; guarded by the queue's mutex

    File() = default;
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    ~File();

    // Opens both descriptors. Returns 0 or an errno; nothing is left open after an error.
    int open(const std::string& path, bool writable, bool create);

    // Makes finished writes durable. Returns 0 or an errno.
    int sync();

    // Hands back the page cache of a range (bytes 0: to the end) so that a streamed model does not fill memory.
    void drop_cache(uint64_t offset, uint64_t bytes) const;

    // Size now, or -1.
    int64_t size() const;
};

}  // namespace io
