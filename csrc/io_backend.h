// How requests reach the kernel. A backend owns its threads and takes its work from the queue.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "io_queue.h"

namespace io {

class Backend {
  public:
    virtual ~Backend() = default;  // only after the queue was closed: returns when nothing is in flight any more
    virtual void notify() = 0;     // the queue has new work or was closed

    // Optional help for the kernel. The queue is idle during register_buffer; an answer other than "" says why not.
    virtual std::string register_buffer(char*, uint64_t) { return ""; }
    virtual void add_file(File&) {}
    virtual void remove_file(File&) {}
};

// nullptr and a reason when liburing was not there at build time or the kernel refuses a ring.
std::unique_ptr<Backend> make_uring_backend(Queue& queue, int setup_errno, std::string& reason);
std::unique_ptr<Backend> make_thread_backend(Queue& queue);

}  // namespace io
