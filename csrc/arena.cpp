#include "arena.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace nb = nanobind;

namespace arena {

#if defined(__linux__)

namespace {

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

void* map_anonymous(std::size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

}  // namespace

// ---------------------------------------------------------------- one region

Region::Region(std::size_t capacity_bytes) : capacity_bytes_(round_up(capacity_bytes, kPageBytes)) {
    // Huge pages need an aligned start; the surplus at both ends is given back, so the size stays exact.
    const std::size_t mapped = capacity_bytes_ + kHugePageBytes;
    char* raw = static_cast<char*>(map_anonymous(mapped));
    if (raw == nullptr) throw std::bad_alloc();
    const std::uintptr_t start = round_up(reinterpret_cast<std::uintptr_t>(raw), kHugePageBytes);
    base_ = reinterpret_cast<char*>(start);
    const std::size_t head = base_ - raw;
    if (head > 0) munmap(raw, head);
    if (mapped > head + capacity_bytes_) munmap(base_ + capacity_bytes_, mapped - head - capacity_bytes_);
    madvise(base_, capacity_bytes_, MADV_HUGEPAGE);  // advice: its failure costs speed only
    high_mark_ = capacity_bytes_;
    free_.emplace(0, capacity_bytes_);
}

Region::Region(std::size_t capacity_bytes, int file) : capacity_bytes_(round_up(capacity_bytes, kPageBytes)) {
    file_ = fcntl(file, F_DUPFD_CLOEXEC, 0);
    void* raw = file_ < 0 ? MAP_FAILED : mmap(nullptr, capacity_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    if (raw == MAP_FAILED) {
        const int error = errno;
        if (file_ >= 0) close(file_);
        throw std::runtime_error(std::strerror(error));
    }
    base_ = static_cast<char*>(raw);
    high_mark_ = capacity_bytes_;
    free_.emplace(0, capacity_bytes_);
}

Region::~Region() {
    munmap(base_, capacity_bytes_);
    if (file_ >= 0) close(file_);
}

bool Region::contains(const void* p) const {
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    return address >= begin() && address < end();
}

void* Region::allocate(std::size_t bytes, bool high_end) {
    if (bytes == 0 || bytes > capacity_bytes_) return nullptr;
    const std::size_t wanted = round_up(bytes, kPageBytes);
    const auto fits = [wanted](const auto& range) { return range.second >= wanted; };
    std::size_t offset;
    if (high_end) {
        const auto found = std::find_if(free_.rbegin(), free_.rend(), fits);
        if (found == free_.rend()) return nullptr;
        const std::size_t left = found->second - wanted;
        offset = found->first + left;
        used_.emplace(offset, wanted);
        if (left > 0) found->second = left;
        else free_.erase(found->first);
        high_mark_ = std::min(high_mark_, std::max(offset, low_mark_));
    } else {
        const auto found = std::find_if(free_.begin(), free_.end(), fits);
        if (found == free_.end()) return nullptr;
        offset = found->first;
        used_.emplace(offset, wanted);
        auto rest = free_.extract(found);  // reuses the node: the rest starts later, but at the same place in the order
        if (rest.mapped() > wanted) {
            rest.key() += wanted;
            rest.mapped() -= wanted;
            free_.insert(std::move(rest));
        }
        low_mark_ = std::max(low_mark_, std::min(offset + wanted, high_mark_));
    }
    used_bytes_ += wanted;
    return base_ + offset;
}

std::size_t Region::release(void* block) {
    if (!contains(block)) return 0;
    const auto found = used_.find(static_cast<char*>(block) - base_);
    if (found == used_.end()) return 0;
    const std::size_t released = found->second;
    std::size_t offset = found->first, bytes = released;
    auto next = free_.lower_bound(offset);
    if (next != free_.begin()) {
        const auto previous = std::prev(next);
        if (previous->first + previous->second == offset) {
            offset = previous->first;
            bytes += previous->second;
            free_.erase(previous);
        }
    }
    if (next != free_.end() && next->first == offset + bytes) {
        bytes += next->second;
        next = free_.erase(next);
    }
    free_.emplace_hint(next, offset, bytes);
    used_.erase(found);
    used_bytes_ -= released;
    return released;
}

std::size_t Region::largest_free_bytes() const {
    std::size_t largest = 0;
    for (const auto& range : free_) largest = std::max(largest, range.second);
    return largest;
}

void Region::discard(void* block, std::size_t bytes) {
    if (file_ < 0) {
        madvise(block, bytes, MADV_DONTNEED);
        return;
    }
    // Where a file system can't do it, what nobody will read is written.
    const auto offset = static_cast<off_t>(static_cast<char*>(block) - base_);
    (void)!fallocate(file_, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, static_cast<off_t>(bytes));
}

void Region::trim() {
    for (const auto& range : free_) discard(base_ + range.first, range.second);
}

// ---------------------------------------------------------------- the process's arena

namespace {

struct Process {
    std::mutex lock;
    std::unique_ptr<Region> current;
    std::unique_ptr<Region> in_file;
    std::vector<std::unique_ptr<Region>> retired;  // of an earlier install, until their last block is free
    std::unordered_map<void*, std::size_t> overflow;
    std::size_t overflow_bytes = 0;
    std::size_t overflow_peak_bytes = 0;
    std::size_t peak_bytes = 0;
    std::size_t beside_file_bytes = 0;
    // Every block ever handed out lies between these two, on a page; other pointers are passed on without the lock.
    std::atomic<std::uintptr_t> lowest{UINTPTR_MAX};
    std::atomic<std::uintptr_t> highest{0};
    std::atomic<std::size_t> min_block_bytes{SIZE_MAX};
};

// Never destroyed: tensors are freed until the last static destructor of the process has run.
Process& process() {
    static Process* const instance = new Process;
    return *instance;
}

thread_local bool long_lived = false;
thread_local std::size_t in_file_min_bytes = 0;  // 0: no block lies in the file

void widen(Process& p, std::uintptr_t begin, std::uintptr_t end) {
    if (begin < p.lowest) p.lowest = begin;
    if (end > p.highest) p.highest = end;
}

int hooked_posix_memalign(void** out, std::size_t alignment, std::size_t bytes) noexcept {
    Process& p = process();
    const bool in_file = in_file_min_bytes != 0 && bytes >= in_file_min_bytes;
    if ((bytes < p.min_block_bytes.load(std::memory_order_relaxed) && !in_file) || alignment > kPageBytes) {
        return posix_memalign(out, alignment, bytes);
    }
    if (bytes > SIZE_MAX / 2) return ENOMEM;
    try {
        const std::lock_guard guard(p.lock);
        if (in_file && p.in_file != nullptr) {
            if (void* block = p.in_file->allocate(bytes, false)) {
                *out = block;
                return 0;
            }
            p.beside_file_bytes += bytes;
        }
        if (void* block = p.current->allocate(bytes, long_lived)) {
            p.peak_bytes = std::max(p.peak_bytes, p.current->used_bytes());
            *out = block;
            return 0;
        }
        const std::size_t mapped = round_up(bytes, kPageBytes);
        p.overflow.reserve(p.overflow.size() + 1);  // nothing may fail once the memory is mapped
        void* block = map_anonymous(mapped);
        if (block == nullptr) return ENOMEM;
        try {
            p.overflow.emplace(block, mapped);
        } catch (...) {
            munmap(block, mapped);
            throw;
        }
        const auto begin = reinterpret_cast<std::uintptr_t>(block);
        widen(p, begin, begin + mapped);
        p.overflow_bytes += mapped;
        p.overflow_peak_bytes = std::max(p.overflow_peak_bytes, p.overflow_bytes);
        *out = block;
        return 0;
    } catch (...) {
        return ENOMEM;
    }
}

bool release_from_arena(Process& p, void* block) {
    const std::lock_guard guard(p.lock);
    if (p.current != nullptr && p.current->release(block) > 0) return true;
    if (p.in_file != nullptr) {
        if (const std::size_t bytes = p.in_file->release(block)) {
            p.in_file->discard(block, bytes);
            return true;
        }
    }
    if (const auto found = p.overflow.find(block); found != p.overflow.end()) {
        munmap(block, found->second);
        p.overflow_bytes -= found->second;
        p.overflow.erase(found);
        return true;
    }
    for (auto it = p.retired.begin(); it != p.retired.end(); ++it) {
        if (const std::size_t bytes = (*it)->release(block)) {
            (*it)->discard(block, bytes);
            if ((*it)->blocks() == 0) p.retired.erase(it);
            return true;
        }
    }
    return false;
}

void hooked_free(void* block) noexcept {
    Process& p = process();
    const auto address = reinterpret_cast<std::uintptr_t>(block);
    if (address % kPageBytes == 0 && address >= p.lowest.load(std::memory_order_relaxed)
        && address < p.highest.load(std::memory_order_relaxed)) {
        const int saved_errno = errno;  // free keeps errno
        const bool ours = release_from_arena(p, block);
        errno = saved_errno;
        if (ours) return;
    }
    free(block);
}

// ---------------------------------------------------------------- redirecting torch's calls

#if defined(__x86_64__)
constexpr unsigned kRelocations[] = {R_X86_64_JUMP_SLOT, R_X86_64_GLOB_DAT, R_X86_64_64};
#elif defined(__aarch64__)
constexpr unsigned kRelocations[] = {R_AARCH64_JUMP_SLOT, R_AARCH64_GLOB_DAT, R_AARCH64_ABS64};
#else
constexpr unsigned kRelocations[] = {0};  // R_*_NONE: nothing matches, install says so
#endif

// A word of a library that holds the address of posix_memalign or free.
struct Slot {
    std::uintptr_t* word;
    bool is_free;
    bool is_c10;
    bool read_only;  // in a page that the loader has sealed
};

// The allocator is in c10. What torch_cpu itself allocates is mostly oneDNN's buffers for generated code, 256 KiB each of which
// few pages are ever touched, kept for as long as a shape is in oneDNN's cache: they would fill the arena with nothing.
bool is_torch_library(const char* path, bool& is_c10) {
    const char* slash = std::strrchr(path, '/');
    const char* name = slash == nullptr ? path : slash + 1;
    is_c10 = std::strncmp(name, "libc10.so", 9) == 0;
    return is_c10 || std::strncmp(name, "libtorch_cpu.so", 15) == 0
        || std::strncmp(name, "libtorch_python.so", 18) == 0;
}

int collect_slots(dl_phdr_info* info, std::size_t, void* data) {
    bool is_c10 = false;
    if (info->dlpi_name == nullptr || !is_torch_library(info->dlpi_name, is_c10)) return 0;
    auto& slots = *static_cast<std::vector<Slot>*>(data);
    const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const ElfW(Dyn)* dynamic = nullptr;
    std::uintptr_t sealed_begin = 0, sealed_end = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type == PT_DYNAMIC) dynamic = reinterpret_cast<const ElfW(Dyn)*>(info->dlpi_addr + header.p_vaddr);
        if (header.p_type == PT_GNU_RELRO) {
            sealed_begin = (info->dlpi_addr + header.p_vaddr) & ~(page - 1);
            sealed_end = (info->dlpi_addr + header.p_vaddr + header.p_memsz) & ~(page - 1);
        }
    }
    if (dynamic == nullptr) return 0;
    std::uintptr_t symbols = 0, strings = 0, tables[2] = {0, 0};
    std::size_t table_bytes[2] = {0, 0};
    for (; dynamic->d_tag != DT_NULL; ++dynamic) {
        // glibc stores absolute addresses here, musl leaves offsets.
        std::uintptr_t address = dynamic->d_un.d_ptr;
        if (address < info->dlpi_addr) address += info->dlpi_addr;
        switch (dynamic->d_tag) {
            case DT_SYMTAB: symbols = address; break;
            case DT_STRTAB: strings = address; break;
            case DT_JMPREL: tables[0] = address; break;
            case DT_PLTRELSZ: table_bytes[0] = dynamic->d_un.d_val; break;
            case DT_RELA: tables[1] = address; break;
            case DT_RELASZ: table_bytes[1] = dynamic->d_un.d_val; break;
            default: break;
        }
    }
    if (symbols == 0 || strings == 0) return 0;
    for (int t = 0; t < 2; ++t) {
        const auto* relocation = reinterpret_cast<const ElfW(Rela)*>(tables[t]);
        const std::size_t count = tables[t] == 0 ? 0 : table_bytes[t] / sizeof(ElfW(Rela));
        for (std::size_t i = 0; i < count; ++i) {
            const auto type = static_cast<unsigned>(ELF64_R_TYPE(relocation[i].r_info));
            if (std::find(std::begin(kRelocations), std::end(kRelocations), type) == std::end(kRelocations)) continue;
            const auto index = ELF64_R_SYM(relocation[i].r_info);
            if (index == 0) continue;
            const char* name = reinterpret_cast<const char*>(strings)
                + reinterpret_cast<const ElfW(Sym)*>(symbols)[index].st_name;
            const bool is_free = std::strcmp(name, "free") == 0;
            if (!is_free && (!is_c10 || std::strcmp(name, "posix_memalign") != 0)) continue;
            const std::uintptr_t at = info->dlpi_addr + relocation[i].r_offset;
            const bool sealed = at >= sealed_begin && at < sealed_end;
            slots.push_back({reinterpret_cast<std::uintptr_t*>(at), is_free, is_c10, sealed});
        }
    }
    return 0;
}

void protect(const Slot& slot, int protection) {
    const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    void* start = reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(slot.word) & ~(page - 1));
    if (slot.read_only && mprotect(start, page, protection) != 0) {
        throw std::runtime_error(std::string("torch's table of functions cannot be unsealed: ") + std::strerror(errno));
    }
}

void redirect_torch() {
    std::vector<Slot> slots;
    dl_iterate_phdr(collect_slots, &slots);
    const auto in_c10 = [&](bool is_free) {
        return std::any_of(slots.begin(), slots.end(), [=](const Slot& s) { return s.is_c10 && s.is_free == is_free; });
    };
    if (slots.empty()) {
        throw std::runtime_error("torch's library libc10.so is not loaded or has no relocations of a known kind");
    }
    if (!in_c10(false) || !in_c10(true)) {
        throw std::runtime_error("this build of torch does not take tensor memory from posix_memalign and free");
    }
    pthread_atfork([] { process().lock.lock(); }, [] { process().lock.unlock(); }, [] { process().lock.unlock(); });
    for (const Slot& slot : slots) protect(slot, PROT_READ | PROT_WRITE);  // all that can fail comes before any change
    // free first: it is right for every pointer, while a block of ours must never reach the C library's free.
    for (const Slot& slot : slots) {
        if (slot.is_free) __atomic_store_n(slot.word, reinterpret_cast<std::uintptr_t>(&hooked_free), __ATOMIC_SEQ_CST);
    }
    for (const Slot& slot : slots) {
        if (slot.is_free) continue;
        __atomic_store_n(slot.word, reinterpret_cast<std::uintptr_t>(&hooked_posix_memalign), __ATOMIC_SEQ_CST);
    }
    for (const Slot& slot : slots) protect(slot, PROT_READ);
}

}  // namespace

void install(std::size_t capacity_bytes, std::size_t min_block_bytes) {
    Process& p = process();
    const bool first = p.current == nullptr;
    if (first || p.current->capacity_bytes() != round_up(capacity_bytes, kPageBytes)) {
        std::unique_ptr<Region> region;
        try {
            region = std::make_unique<Region>(capacity_bytes);
        } catch (const std::bad_alloc&) {
            throw std::runtime_error("the system refuses to reserve " + std::to_string(capacity_bytes)
                                     + " bytes of address space");
        }
        const std::lock_guard guard(p.lock);
        p.retired.reserve(p.retired.size() + 1);
        widen(p, region->begin(), region->end());
        std::swap(p.current, region);
        if (region != nullptr && region->blocks() > 0) {
            region->trim();
            p.retired.push_back(std::move(region));
        }
        p.peak_bytes = 0;
    }
    if (first) {
        try {
            redirect_torch();
        } catch (...) {
            p.current.reset();  // nothing has been redirected
            throw;
        }
    }
    p.min_block_bytes = std::max<std::size_t>(min_block_bytes, 1);
}

Stats stats() {
    Process& p = process();
    const std::lock_guard guard(p.lock);
    Stats s;
    if (p.current == nullptr) return s;
    s.capacity_bytes = p.current->capacity_bytes();
    s.used_bytes = p.current->used_bytes();
    s.peak_bytes = p.peak_bytes;
    s.extent_bytes = p.current->extent_bytes();
    s.largest_free_bytes = p.current->largest_free_bytes();
    s.blocks = p.current->blocks();
    s.overflow_bytes = p.overflow_bytes;
    s.overflow_peak_bytes = p.overflow_peak_bytes;
    return s;
}

void reset_peak() {
    Process& p = process();
    const std::lock_guard guard(p.lock);
    p.peak_bytes = p.current == nullptr ? 0 : p.current->used_bytes();
    p.overflow_peak_bytes = p.overflow_bytes;
}

bool set_long_lived(bool on) {
    const bool was = long_lived;
    long_lived = on;
    return was;
}

void map_file(int file, std::size_t bytes) {
    Process& p = process();
    std::unique_ptr<Region> region;
    if (file >= 0) region = std::make_unique<Region>(bytes, file);
    const std::lock_guard guard(p.lock);
    p.retired.reserve(p.retired.size() + 1);
    if (region != nullptr) widen(p, region->begin(), region->end());
    std::swap(p.in_file, region);
    p.beside_file_bytes = 0;
    if (region != nullptr && region->blocks() > 0) p.retired.push_back(std::move(region));
}

std::size_t set_in_file(std::size_t min_bytes) {
    const std::size_t was = in_file_min_bytes;
    in_file_min_bytes = min_bytes;
    return was;
}

std::size_t bytes_in_file() {
    Process& p = process();
    const std::lock_guard guard(p.lock);
    return p.in_file == nullptr ? 0 : p.in_file->used_bytes();
}

std::size_t bytes_beside_file() {
    Process& p = process();
    const std::lock_guard guard(p.lock);
    return p.beside_file_bytes;
}

namespace {

// The whole pages of a part of a block in the file, as offset and size there; a size of 0: it lies elsewhere.
std::pair<std::size_t, std::size_t> pages_in_file(const Process& p, std::uintptr_t address, std::size_t bytes) {
    if (p.in_file == nullptr || !p.in_file->contains(reinterpret_cast<void*>(address))) return {0, 0};
    const std::size_t begin = (address - p.in_file->begin()) / kPageBytes * kPageBytes;
    const std::size_t end = std::min(round_up(address - p.in_file->begin() + bytes, kPageBytes), p.in_file->capacity_bytes());
    return {begin, end - begin};
}

}  // namespace

void let_go(std::uintptr_t address, std::size_t bytes) {
    Process& p = process();
    const std::lock_guard guard(p.lock);
    const auto [offset, size] = pages_in_file(p, address, bytes);
    if (size == 0) return;
    sync_file_range(p.in_file->file(), static_cast<off_t>(offset), static_cast<off_t>(size), SYNC_FILE_RANGE_WRITE);
#if defined(MADV_COLD)
    madvise(reinterpret_cast<void*>(p.in_file->begin() + offset), size, MADV_COLD);
#endif
}

void fetch_soon(std::uintptr_t address, std::size_t bytes) {
    Process& p = process();
    const std::lock_guard guard(p.lock);
    const auto [offset, size] = pages_in_file(p, address, bytes);
    if (size > 0) madvise(reinterpret_cast<void*>(p.in_file->begin() + offset), size, MADV_WILLNEED);
}

int file_error() {
    Process& p = process();
    const std::lock_guard guard(p.lock);
    if (p.in_file == nullptr) return 0;
    return sync_file_range(p.in_file->file(), 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE) == 0 ? 0 : errno;
}

#else  // not Linux

void install(std::size_t, std::size_t) { throw std::runtime_error("the tensor arena needs Linux"); }
Stats stats() { return {}; }
void reset_peak() {}
bool set_long_lived(bool) { return false; }
void map_file(int, std::size_t) { throw std::runtime_error("tensors in a file need Linux"); }
std::size_t set_in_file(std::size_t) { return 0; }
std::size_t bytes_in_file() { return 0; }
std::size_t bytes_beside_file() { return 0; }
void let_go(std::uintptr_t, std::size_t) {}
void fetch_soon(std::uintptr_t, std::size_t) {}
int file_error() { return 0; }

#endif

}  // namespace arena

void register_arena(nb::module_& parent) {
    nb::module_ m = parent.def_submodule("arena", "Bounded, recycled home for torch's CPU tensors.");
    m.def("install", &arena::install, nb::arg("capacity_bytes"), nb::arg("min_block_bytes"));
    m.def("stats", [] {
        const arena::Stats s = arena::stats();
        nb::dict d;
        d["capacity_bytes"] = s.capacity_bytes;
        d["used_bytes"] = s.used_bytes;
        d["peak_bytes"] = s.peak_bytes;
        d["extent_bytes"] = s.extent_bytes;
        d["largest_free_bytes"] = s.largest_free_bytes;
        d["blocks"] = s.blocks;
        d["overflow_bytes"] = s.overflow_bytes;
        d["overflow_peak_bytes"] = s.overflow_peak_bytes;
        return d;
    });
    m.def("reset_peak", &arena::reset_peak);
    m.def("set_long_lived", &arena::set_long_lived, nb::arg("on"));
    m.def("map_file", &arena::map_file, nb::arg("file"), nb::arg("bytes"));
    m.def("set_in_file", &arena::set_in_file, nb::arg("min_bytes"));
    m.def("bytes_in_file", &arena::bytes_in_file);
    m.def("bytes_beside_file", &arena::bytes_beside_file);
    m.def("let_go", &arena::let_go, nb::arg("address"), nb::arg("bytes"));
    m.def("fetch_soon", &arena::fetch_soon, nb::arg("address"), nb::arg("bytes"));
    m.def("file_error", &arena::file_error, nb::call_guard<nb::gil_scoped_release>());
}
