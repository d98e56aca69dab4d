// Backend on io_uring: one thread keeps a sliding window of requests in the ring and refills it at every completion.
#include "io_backend.h"

#ifdef HAVE_LIBURING

#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace io {

namespace {

constexpr uint64_t kMostFixedBytes = 1ull << 30;  // the kernel's limit for one registered buffer
constexpr int kTableFiles = 256;                  // pairs of descriptors in the ring's table; more files work without

std::string describe(int error) { return std::strerror(error); }

class UringBackend final : public Backend {
  public:
    // Takes over a ring that was set up.
    UringBackend(Queue& queue, const io_uring& ring, int wake_fd) : queue_(queue), ring_(ring), wake_fd_(wake_fd) {
        std::vector<int> empty(2 * kTableFiles, -1);
        if (io_uring_register_files(&ring_, empty.data(), static_cast<unsigned>(empty.size())) == 0)
            for (int slot = kTableFiles - 1; slot >= 0; --slot) free_slots_.push_back(slot);
        thread_ = std::thread([this] { work(); });
    }

    ~UringBackend() override {
        notify();
        thread_.join();
        io_uring_queue_exit(&ring_);
        ::close(wake_fd_);
    }

    void notify() override {
        const uint64_t one = 1;
        while (::write(wake_fd_, &one, sizeof one) < 0 && errno == EINTR) {
        }
    }

    std::string register_buffer(char* memory, uint64_t bytes) override {
        std::vector<iovec> wanted = fixed_;
        for (uint64_t begin = 0; begin < bytes; begin += kMostFixedBytes)
            wanted.push_back({memory + begin, static_cast<size_t>(std::min(kMostFixedBytes, bytes - begin))});
        // Older kernels can only replace the whole table. The queue is idle, so no request refers to it.
        if (!fixed_.empty()) io_uring_unregister_buffers(&ring_);
        int result = io_uring_register_buffers(&ring_, wanted.data(), static_cast<unsigned>(wanted.size()));
        if (result == 0) {
            fixed_ = std::move(wanted);
            return "";
        }
        if (!fixed_.empty() && io_uring_register_buffers(&ring_, fixed_.data(), static_cast<unsigned>(fixed_.size())) != 0)
            fixed_.clear();
        std::string reason = "buffer of " + std::to_string(bytes) + " bytes is not registered: " + describe(-result);
        if (result == -ENOMEM) reason += " (the limit on locked memory, `ulimit -l`, is too low)";
        return reason;
    }

    void add_file(File& file) override {
        std::lock_guard lock(slots_mutex_);
        if (free_slots_.empty()) return;
        const int slot = free_slots_.back();
        if (!set_slot(slot, {file.buffered_fd, file.direct_fd})) return;
        free_slots_.pop_back();
        file.table_slot = slot;
    }

    void remove_file(File& file) override {
        if (file.table_slot < 0) return;
        std::lock_guard lock(slots_mutex_);
        set_slot(file.table_slot, {-1, -1});
        free_slots_.push_back(file.table_slot);
        file.table_slot = -1;
    }

  private:
    bool set_slot(int slot, std::array<int, 2> fds) {
        return io_uring_register_files_update(&ring_, static_cast<unsigned>(2 * slot), fds.data(), 2) == 2;
    }

    int fixed_index(const char* memory, uint64_t bytes) const {
        for (size_t i = 0; i < fixed_.size(); ++i) {
            const char* base = static_cast<const char*>(fixed_[i].iov_base);
            if (memory >= base && memory + bytes <= base + fixed_[i].iov_len) return static_cast<int>(i);
        }
        return -1;
    }

    void prepare(io_uring_sqe* sqe, Request* request) {
        const bool in_table = request->file->table_slot >= 0;
        const int fd = in_table ? 2 * request->file->table_slot + (request->direct ? 1 : 0) : request->fd();
        const unsigned length = static_cast<unsigned>(request->length());
        const int fixed = fixed_index(request->cursor(), length);
        if (fixed >= 0) {
            if (request->write)
                io_uring_prep_write_fixed(sqe, fd, request->cursor(), length, request->position(), fixed);
            else
                io_uring_prep_read_fixed(sqe, fd, request->cursor(), length, request->position(), fixed);
        } else if (request->write) {
            io_uring_prep_write(sqe, fd, request->cursor(), length, request->position());
        } else {
            io_uring_prep_read(sqe, fd, request->cursor(), length, request->position());
        }
        if (in_table) io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
        io_uring_sqe_set_data(sqe, request);
    }

    void work() {
        bool armed = false;  // a read of wake_fd_ is in the ring
        for (;;) {
            const bool closed = queue_.closed();
            if (!armed && closed && queue_.drained()) return;
            if (!armed && !closed) {
                io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
                io_uring_prep_read(sqe, wake_fd_, &wake_count_, sizeof wake_count_, 0);
                io_uring_sqe_set_data(sqe, nullptr);
                armed = true;
            }
            // The ring has a place for each request of the window and one for the wake-up.
            while (Request* request = queue_.next()) prepare(io_uring_get_sqe(&ring_), request);
            const int result = io_uring_submit_and_wait(&ring_, 1);
            const bool trouble = result < 0 && result != -EINTR;
            if (trouble) queue_.note("io_uring_enter: " + describe(-result));

            unsigned reaped = 0;
            io_uring_cqe* cqe;
            while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
                auto* request = static_cast<Request*>(io_uring_cqe_get_data(cqe));
                const int outcome = cqe->res;
                io_uring_cqe_seen(&ring_, cqe);
                ++reaped;
                if (request)
                    queue_.complete(request, outcome);
                else
                    armed = false;
            }
            // Short of kernel memory, for one: what was not taken stays in the ring and is offered again.
            if (trouble && reaped == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }

    Queue& queue_;
    io_uring ring_;
    const int wake_fd_;
    uint64_t wake_count_ = 0;
    std::vector<iovec> fixed_;  // changed only while the queue is idle
    std::mutex slots_mutex_;
    std::vector<int> free_slots_;
    std::thread thread_;
};

}  // namespace

std::unique_ptr<Backend> make_uring_backend(Queue& queue, int setup_errno, std::string& reason) {
    io_uring ring;
    const int result = setup_errno != 0 ? -setup_errno : io_uring_queue_init(queue.queue_depth() + 1, &ring, 0);
    if (result != 0) {
        reason = "the kernel refused io_uring: " + describe(-result);
        return nullptr;
    }
    io_uring_probe* probe = io_uring_get_probe_ring(&ring);
    const bool has_read = probe && io_uring_opcode_supported(probe, IORING_OP_READ);
    if (probe) io_uring_free_probe(probe);
    if (!has_read) {
        io_uring_queue_exit(&ring);
        reason = "the kernel's io_uring is older than Linux 5.6";
        return nullptr;
    }
    const int wake_fd = ::eventfd(0, EFD_CLOEXEC);
    if (wake_fd < 0) {
        reason = "no eventfd: " + describe(errno);
        io_uring_queue_exit(&ring);
        return nullptr;
    }
    return std::make_unique<UringBackend>(queue, ring, wake_fd);
}

}  // namespace io

#else

namespace io {

std::unique_ptr<Backend> make_uring_backend(Queue&, int, std::string& reason) {
    reason = "built without liburing";
    return nullptr;
}

}  // namespace io

#endif
