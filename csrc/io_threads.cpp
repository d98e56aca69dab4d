// Backend of plain threads: each takes a request, calls pread or pwrite, reports, and takes the next.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <thread>
#include <vector>

#include "io_backend.h"

namespace io {

namespace {

constexpr uint32_t kMostThreads = 16;

class ThreadBackend final : public Backend {
  public:
    explicit ThreadBackend(Queue& queue) : queue_(queue) {
        for (uint32_t i = 0; i < std::min(queue.queue_depth(), kMostThreads); ++i) threads_.emplace_back([this] { work(); });
    }

    ~ThreadBackend() override {
        for (std::thread& thread : threads_) thread.join();
    }

    void notify() override {}  // threads sleep on the queue's own condition

  private:
    void work() {
        while (Request* request = queue_.next_waiting()) {
            const off_t position = static_cast<off_t>(request->position());
            const ssize_t moved = request->write ? ::pwrite(request->fd(), request->cursor(), request->length(), position)
                                                 : ::pread(request->fd(), request->cursor(), request->length(), position);
            queue_.complete(request, moved >= 0 ? moved : -errno);
        }
    }

    Queue& queue_;
    std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Backend> make_thread_backend(Queue& queue) { return std::make_unique<ThreadBackend>(queue); }

}  // namespace io
