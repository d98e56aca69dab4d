// What both backends share: tickets, the cutting of extents into requests, staging, and the judgement of results.
//
// A backend takes requests with next(), fills them from or to the disk as it likes and reports every result with
// complete(); all rules about alignment, short transfers, retries, ends of files and errors are here, once.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "io_file.h"

namespace io {

// One contiguous range of a file and the memory it is copied to (read) or from (write). Any alignment.
struct Extent {
    std::shared_ptr<File> file;
    uint64_t offset;
    uint64_t bytes;
    char* memory;
};

// A failed transfer, in the terms of the caller's extent.
struct Failure {
    std::string path;
    uint64_t offset;
    uint64_t wanted;
    uint64_t got;
    int error;  // errno; 0: the file ends before the extent does
};

struct Ticket {
    int64_t id;
    bool write;
    std::vector<Extent> extents;
    size_t next_extent = 0;       // cursor of the cutting: requests before it have been made
    uint64_t next_byte = 0;       // within extents[next_extent]
    uint64_t requests = 0;        // made and not yet finished
    std::optional<Failure> failure;
    uint64_t bytes = 0;           // of all extents
    std::chrono::steady_clock::time_point submitted, started;  // started: the first request of it went to the kernel

    bool cut() const { return next_extent == extents.size(); }
};

// One transfer. `done` is the current position: a short result moves it and the rest is asked for again.
struct Request {
    Ticket* ticket = nullptr;
    size_t extent = 0;
    File* file = nullptr;
    bool write = false;
    bool direct = false;
    uint64_t offset = 0;   // in the file, where the request began
    uint64_t bytes = 0;    // whole length; a read may cover more than is needed, up to page bounds
    uint64_t needed = 0;   // finished when done >= needed
    uint64_t done = 0;
    char* memory = nullptr;  // the caller's memory or a staging buffer
    int staging = -1;        // staging buffer held, -1: none
    char* copy = nullptr;    // the caller's side of a staged request
    uint64_t copy_skip = 0;  // bytes of a staged read before the first wanted one
    uint64_t copy_bytes = 0;
    int retries = 0;         // transient errors in a row
    int injected_error = 0;
    uint64_t injected_short = 0;  // 0: none

    int fd() const { return direct ? file->direct_fd : file->buffered_fd; }
    uint64_t position() const { return offset + done; }
    char* cursor() const { return memory + done; }
    uint64_t length() const;  // what to ask the kernel for now
};

// Faults for tests: every n-th transfer (counted over the engine's life, from 1) meets the named fate. 0: never.
struct FaultPlan {
    uint64_t short_every = 0;
    uint64_t short_bytes = 1000;   // what a short transfer moves
    uint64_t eagain_every = 0;
    uint64_t eintr_every = 0;
    uint64_t eio_at = 0;           // this one transfer fails with EIO
    uint64_t einval_direct_every = 0;  // direct transfers refused, as by a file system that only pretends to have O_DIRECT
    int setup_errno = 0;           // the kernel forbids io_uring with this errno
};

struct Counters {
    uint64_t read_bytes = 0;   // moved by the kernel, page rounding included
    uint64_t write_bytes = 0;
    double busy_seconds = 0;   // at least one request was in flight
};

// A finished ticket. Times are those of the steady clock, in seconds.
struct Transfer {
    bool write;
    uint64_t bytes;
    double submitted;
    double started;
    double finished;
};

class Queue {
  public:
    Queue(uint32_t queue_depth, uint64_t request_bytes, uint64_t staging_bytes, FaultPlan faults);
    ~Queue();
    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;

    // For the caller's threads.
    int64_t submit(bool write, std::vector<Extent> extents);
    bool finished(int64_t id);
    bool wait_for(int64_t id, std::chrono::milliseconds limit);  // true: finished
    std::optional<Failure> failure(int64_t id);
    bool wait_file_idle(const File& file, std::chrono::milliseconds limit);
    void close();                                   // fails what has not started; what is in flight drains
    void while_idle(const std::function<void()>& action);  // nothing is in flight while it runs
    Counters counters();
    std::vector<std::string> notes();
    void note(const std::string& text);
    void keep_log(bool keep);              // of tickets that finish from now on; what is logged is dropped
    std::vector<Transfer> take_log();      // in the order in which they finished

    // For a backend.
    uint32_t queue_depth() const { return queue_depth_; }
    Request* next();                                // nullptr: nothing to do now, or queue_depth in flight
    Request* next_waiting();                        // blocks; nullptr: closed
    void complete(Request* request, int64_t result);  // result: bytes moved, or a negative errno
    bool closed();
    bool drained();  // nothing is in flight

  private:
    static void fill_staging(Request& request);
    // All that follow want the mutex to be held.
    Request* take();
    bool cut(Ticket& ticket, Request& request);
    bool stage(Request& request, bool small);
    void inject(Request& request);
    void fail(Ticket& ticket, const Extent& extent, uint64_t position, int error);
    void fail(Request* request, int error);
    void retire(Request* request);
    void finish_if_done(Ticket& ticket);
    void leave_flight();

    const uint32_t queue_depth_;
    const uint64_t request_bytes_;
    const FaultPlan faults_;
    uint64_t large_bytes_ = 0;  // of one large staging buffer; the small ones have kSmallBytes
    int num_large_ = 0;
    int num_small_ = 0;
    char* staging_ = nullptr;
    uint64_t staging_mapped_ = 0;

    std::mutex mutex_;
    std::condition_variable work_;      // for threads in next_waiting()
    std::condition_variable progress_;  // for callers
    std::map<int64_t, std::unique_ptr<Ticket>> tickets_;  // unfinished and failed ones
    std::deque<Ticket*> uncut_;
    std::deque<Request*> again_;  // short or refused for a moment: to be issued again
    std::vector<std::unique_ptr<Request>> requests_;
    std::vector<Request*> free_requests_;
    std::vector<int> free_large_, free_small_;
    std::vector<std::string> notes_;
    std::vector<Transfer> log_;
    bool logs_ = false;
    int64_t next_ticket_ = 1;
    uint32_t in_flight_ = 0;  // taken by a backend
    uint32_t pauses_ = 0;     // while_idle() calls that wait: nothing new is handed out
    uint64_t transfers_ = 0;
    bool closed_ = false;
    Counters counters_;
    std::chrono::steady_clock::time_point busy_since_;
};

}  // namespace io
