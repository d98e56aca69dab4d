#include "io_queue.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <thread>
#include <utility>

namespace io {

namespace {

// Page ends and single rows (an embedding's) go through small buffers, so that many of them fly at once.
constexpr uint64_t kSmallBytes = 32 * 1024;
constexpr uint64_t kMostLargeBytes = 1 << 20;
constexpr int kQuickRetries = 16;
constexpr int kMostRetries = 5000;  // a millisecond apart: EAGAIN for five seconds is an error

bool aligned(uint64_t value) { return value % kAlignment == 0; }
bool aligned(const char* memory) { return aligned(reinterpret_cast<uintptr_t>(memory)); }

bool every(uint64_t n, uint64_t count) { return n != 0 && count % n == 0; }

}  // namespace

uint64_t Request::length() const {
    uint64_t rest = bytes - done;
    if (injected_short != 0) rest = std::min(rest, direct ? align_up(injected_short) : injected_short);
    return rest;
}

Queue::Queue(uint32_t queue_depth, uint64_t request_bytes, uint64_t staging_bytes, FaultPlan faults)
    : queue_depth_(queue_depth), request_bytes_(std::max(align_down(request_bytes), kAlignment)), faults_(faults) {
    large_bytes_ = std::clamp(std::min(request_bytes_, align_down(staging_bytes)), kSmallBytes, kMostLargeBytes);
    num_large_ = static_cast<int>(std::max<uint64_t>(1, staging_bytes / large_bytes_));
    num_small_ = static_cast<int>(queue_depth);
    staging_mapped_ = num_large_ * large_bytes_ + num_small_ * kSmallBytes;
    void* mapped = ::mmap(nullptr, staging_mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    staging_ = static_cast<char*>(mapped);
    // Taken from the back, so the buffers with the lowest numbers are used first and the others may never cost memory.
    for (int i = num_large_ - 1; i >= 0; --i) free_large_.push_back(i);
    for (int i = num_small_ - 1; i >= 0; --i) free_small_.push_back(num_large_ + i);
}

Queue::~Queue() { ::munmap(staging_, staging_mapped_); }

int64_t Queue::submit(bool write, std::vector<Extent> extents) {
    std::erase_if(extents, [](const Extent& extent) { return extent.bytes == 0; });
    std::unique_lock lock(mutex_);
    const int64_t id = next_ticket_++;
    if (extents.empty()) return id;
    auto ticket = std::make_unique<Ticket>();
    ticket->id = id;
    ticket->write = write;
    ticket->extents = std::move(extents);
    ticket->submitted = std::chrono::steady_clock::now();
    for (const Extent& extent : ticket->extents) {
        ++extent.file->pending;
        ticket->bytes += extent.bytes;
    }
    Ticket& added = *ticket;
    tickets_.emplace(id, std::move(ticket));
    if (closed_) {
        fail(added, added.extents[0], added.extents[0].offset, ECANCELED);
        finish_if_done(added);
    } else {
        uncut_.push_back(&added);
    }
    lock.unlock();
    work_.notify_all();
    return id;
}

bool Queue::finished(int64_t id) {
    std::lock_guard lock(mutex_);
    const auto found = tickets_.find(id);
    return found == tickets_.end() || (found->second->cut() && found->second->requests == 0);
}

bool Queue::wait_for(int64_t id, std::chrono::milliseconds limit) {
    std::unique_lock lock(mutex_);
    return progress_.wait_for(lock, limit, [&] {
        const auto found = tickets_.find(id);
        return found == tickets_.end() || (found->second->cut() && found->second->requests == 0);
    });
}

std::optional<Failure> Queue::failure(int64_t id) {
    std::lock_guard lock(mutex_);
    const auto found = tickets_.find(id);
    return found == tickets_.end() ? std::nullopt : found->second->failure;
}

bool Queue::wait_file_idle(const File& file, std::chrono::milliseconds limit) {
    std::unique_lock lock(mutex_);
    return progress_.wait_for(lock, limit, [&] { return file.pending == 0; });
}

void Queue::close() {
    std::unique_lock lock(mutex_);
    closed_ = true;
    while (!uncut_.empty()) {
        Ticket& ticket = *uncut_.front();
        const Extent& extent = ticket.extents[ticket.next_extent];
        fail(ticket, extent, extent.offset + ticket.next_byte, ECANCELED);
        finish_if_done(ticket);
    }
    while (!again_.empty()) {
        Request* request = again_.front();
        again_.pop_front();
        fail(request, ECANCELED);
    }
    lock.unlock();
    work_.notify_all();
}

void Queue::while_idle(const std::function<void()>& action) {
    std::unique_lock lock(mutex_);
    ++pauses_;
    progress_.wait(lock, [&] { return in_flight_ == 0; });
    action();
    --pauses_;
    lock.unlock();
    work_.notify_all();
}

void Queue::keep_log(bool keep) {
    std::lock_guard lock(mutex_);
    logs_ = keep;
    log_.clear();
}

std::vector<Transfer> Queue::take_log() {
    std::lock_guard lock(mutex_);
    return std::exchange(log_, {});
}

Counters Queue::counters() {
    std::lock_guard lock(mutex_);
    Counters now = counters_;
    if (in_flight_ > 0)
        now.busy_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - busy_since_).count();
    return now;
}

std::vector<std::string> Queue::notes() {
    std::lock_guard lock(mutex_);
    return notes_;
}

void Queue::note(const std::string& text) {
    std::lock_guard lock(mutex_);
    if (std::find(notes_.begin(), notes_.end(), text) == notes_.end()) notes_.push_back(text);
}

bool Queue::closed() {
    std::lock_guard lock(mutex_);
    return closed_;
}

bool Queue::drained() {
    std::lock_guard lock(mutex_);
    return in_flight_ == 0;
}

Request* Queue::next() {
    std::unique_lock lock(mutex_);
    Request* request = take();
    lock.unlock();
    if (request) fill_staging(*request);
    return request;
}

Request* Queue::next_waiting() {
    std::unique_lock lock(mutex_);
    Request* request = nullptr;
    work_.wait(lock, [&] { return (request = take()) != nullptr || closed_; });
    lock.unlock();
    if (!request) return nullptr;
    work_.notify_one();  // there may be more for another thread
    fill_staging(*request);
    return request;
}

void Queue::fill_staging(Request& request) {
    if (request.write && request.staging >= 0 && request.done == 0)
        std::memcpy(request.memory, request.copy, request.copy_bytes);
}

Request* Queue::take() {
    if (closed_ || pauses_ > 0 || in_flight_ == queue_depth_) return nullptr;
    Request* request = nullptr;
    if (!again_.empty()) {
        request = again_.front();
        again_.pop_front();
    } else {
        if (uncut_.empty()) return nullptr;
        Ticket& ticket = *uncut_.front();
        if (free_requests_.empty()) {
            requests_.push_back(std::make_unique<Request>());
            free_requests_.push_back(requests_.back().get());
        }
        request = free_requests_.back();
        if (!cut(ticket, *request)) return nullptr;  // no staging buffer is free until a request completes
        free_requests_.pop_back();
        ++ticket.requests;
        if (ticket.cut()) uncut_.pop_front();
    }
    inject(*request);
    if (in_flight_++ == 0) busy_since_ = std::chrono::steady_clock::now();
    return request;
}

// Makes the next request of a ticket. With O_DIRECT the parts of an extent are
//   in place   whole pages whose address is page-aligned as well: straight between disk and the caller's memory;
//   staged     everything else that is read, and whole pages written from an address that is not aligned: by way of
//              a staging buffer; a read covers whole pages and only the wanted bytes are copied out;
//   buffered   parts of pages that are written: the page cache does the read-modify-write.
bool Queue::cut(Ticket& ticket, Request& request) {
    const Extent& extent = ticket.extents[ticket.next_extent];
    const uint64_t begin = extent.offset + ticket.next_byte;
    const uint64_t left = extent.bytes - ticket.next_byte;
    char* const memory = extent.memory + ticket.next_byte;
    if (logs_ && ticket.next_extent == 0 && ticket.next_byte == 0) ticket.started = std::chrono::steady_clock::now();

    request = Request{};
    request.ticket = &ticket;
    request.extent = ticket.next_extent;
    request.file = extent.file.get();
    request.write = ticket.write;
    request.direct = extent.file->direct;
    request.offset = begin;
    request.memory = memory;
    uint64_t taken;  // of the extent

    const uint64_t cover = align_up(begin + left) - align_down(begin);
    if (!request.direct) {
        taken = std::min(left, request_bytes_);
        request.bytes = taken;
    } else if (aligned(begin) && aligned(memory) && left >= kAlignment &&
               (ticket.write || aligned(left) || cover > kSmallBytes)) {
        taken = std::min(align_down(left), request_bytes_);
        request.bytes = taken;
    } else if (ticket.write && (!aligned(begin) || left < kAlignment)) {
        taken = aligned(begin) ? left : std::min(left, align_up(begin) - begin);
        request.direct = false;
        request.bytes = taken;
    } else if (ticket.write) {
        const bool small = align_down(left) <= kSmallBytes;
        taken = std::min(align_down(left), small ? kSmallBytes : large_bytes_);
        if (!stage(request, small)) return false;
        request.bytes = taken;
        request.copy = memory;
        request.copy_bytes = taken;
    } else {
        const uint64_t skip = begin - align_down(begin);
        const bool congruent = (begin - reinterpret_cast<uintptr_t>(memory)) % kAlignment == 0;
        const bool small = cover <= kSmallBytes || congruent;
        if (!stage(request, small)) return false;
        request.offset = begin - skip;
        // Congruent and long: only the first page, what follows can be read in place.
        request.bytes = cover <= kSmallBytes ? cover : congruent ? kAlignment : std::min(cover, large_bytes_);
        taken = std::min(left, request.bytes - skip);
        request.copy = memory;
        request.copy_skip = skip;
        request.copy_bytes = taken;
    }
    request.needed = request.copy_skip + taken;
    ticket.next_byte += taken;
    if (ticket.next_byte == extent.bytes) {
        ++ticket.next_extent;
        ticket.next_byte = 0;
    }
    return true;
}

bool Queue::stage(Request& request, bool small) {
    std::vector<int>& free = small ? free_small_ : free_large_;
    if (free.empty()) return false;
    request.staging = free.back();
    free.pop_back();
    const uint64_t place = small ? num_large_ * large_bytes_ + (request.staging - num_large_) * kSmallBytes
                                 : request.staging * large_bytes_;
    request.memory = staging_ + place;
    return true;
}

void Queue::inject(Request& request) {
    const uint64_t count = ++transfers_;
    request.injected_error = 0;
    request.injected_short = every(faults_.short_every, count) ? faults_.short_bytes : 0;
    if (count == faults_.eio_at) request.injected_error = EIO;
    if (every(faults_.eagain_every, count)) request.injected_error = EAGAIN;
    if (every(faults_.eintr_every, count)) request.injected_error = EINTR;
    if (request.direct && every(faults_.einval_direct_every, count)) request.injected_error = EINVAL;
}

void Queue::complete(Request* request, int64_t result) {
    if (request->injected_error != 0) result = -request->injected_error;
    if (request->injected_short != 0) result = std::min(result, static_cast<int64_t>(request->injected_short));

    uint64_t moved = 0;
    int error = 0;
    bool failed = false;
    if (result > 0) {
        moved = static_cast<uint64_t>(result);
        request->done += moved;
        request->retries = 0;
        // The rest of a transfer that stopped inside a page (the file's last one, mostly) needs no alignment this way.
        if (request->done < request->needed && !aligned(request->position())) request->direct = false;
    } else if (result == 0) {
        failed = true;
        error = request->write ? EIO : 0;
    } else if (result == -EAGAIN || result == -EINTR) {
        if (++request->retries > kQuickRetries) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        failed = request->retries > kMostRetries;
        error = static_cast<int>(-result);
    } else if (result == -EINVAL && request->direct) {
        if (request->file->direct.exchange(false))
            note("no O_DIRECT for " + request->file->path + ": it goes through the page cache");
        request->direct = false;
    } else {
        failed = true;
        error = static_cast<int>(-result);
    }

    const bool finished = !failed && request->done >= request->needed;
    if (finished && !request->write) {
        if (request->staging >= 0) std::memcpy(request->copy, request->memory + request->copy_skip, request->copy_bytes);
        if (!request->direct) request->file->drop_cache(request->offset, request->bytes);
    }

    std::lock_guard lock(mutex_);
    (request->write ? counters_.write_bytes : counters_.read_bytes) += moved;
    leave_flight();
    if (finished) {
        retire(request);
    } else if (failed) {
        fail(request, error);
    } else if (closed_) {
        fail(request, ECANCELED);
    } else {
        again_.push_back(request);
    }
    work_.notify_one();
}

void Queue::leave_flight() {
    if (--in_flight_ > 0) return;
    counters_.busy_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - busy_since_).count();
    if (pauses_ > 0) progress_.notify_all();
}

void Queue::fail(Ticket& ticket, const Extent& extent, uint64_t position, int error) {
    if (!ticket.failure) {
        // At the end of a file a later request may be the first to notice: the size says how much there is.
        const int64_t size = error == 0 ? extent.file->size() : -1;
        if (size >= 0) position = static_cast<uint64_t>(size);
        const uint64_t got = position > extent.offset ? std::min(position - extent.offset, extent.bytes) : 0;
        ticket.failure = Failure{extent.file->path, extent.offset, extent.bytes, got, error};
    }
    ticket.next_extent = ticket.extents.size();
    std::erase(uncut_, &ticket);
}

void Queue::fail(Request* request, int error) {
    fail(*request->ticket, request->ticket->extents[request->extent], request->position(), error);
    retire(request);
}

void Queue::retire(Request* request) {
    if (request->staging >= 0) (request->staging < num_large_ ? free_large_ : free_small_).push_back(request->staging);
    Ticket& ticket = *request->ticket;
    --ticket.requests;
    free_requests_.push_back(request);
    finish_if_done(ticket);
}

void Queue::finish_if_done(Ticket& ticket) {
    if (!ticket.cut() || ticket.requests > 0) return;
    for (const Extent& extent : ticket.extents) --extent.file->pending;
    ticket.extents.clear();
    ticket.next_extent = 0;
    if (logs_) {
        const auto seconds = [](std::chrono::steady_clock::time_point time) {
            return std::chrono::duration<double>(time.time_since_epoch()).count();
        };
        log_.push_back({ticket.write, ticket.bytes, seconds(ticket.submitted), seconds(std::max(ticket.started, ticket.submitted)),
                        seconds(std::chrono::steady_clock::now())});
    }
    if (!ticket.failure) tickets_.erase(ticket.id);
    progress_.notify_all();
}

}  // namespace io
