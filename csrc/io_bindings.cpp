// Python's view of the engine. Waiting never holds the GIL and can be interrupted by a signal.
#include "io_bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "io_backend.h"

namespace nb = nanobind;

namespace io {

namespace {

using Clock = std::chrono::steady_clock;
using ExtentArguments = std::tuple<int64_t, uint64_t, uint64_t, uint64_t>;  // file, offset, bytes, address

class Engine {
  public:
    Engine(const std::string& backend, uint32_t queue_depth, uint64_t request_bytes, uint64_t staging_bytes,
           const FaultPlan& faults)
        : queue_(queue_depth, request_bytes, staging_bytes, faults), process_(::getpid()) {
        if (backend != "threads") backend_ = make_uring_backend(queue_, faults.setup_errno, reason_);
        name_ = backend_ ? "io_uring" : "threads";
        if (backend == "threads") reason_ = "threads were asked for";
        if (!backend_ && backend != "io_uring") backend_ = make_thread_backend(queue_);
    }

    ~Engine() { close(); }

    bool usable() const { return backend_ != nullptr; }

    void close() {
        std::unique_ptr<Backend> backend;
        {
            std::lock_guard lock(mutex_);
            backend = std::move(backend_);
        }
        if (!backend) return;
        if (::getpid() != process_) {
            (void)backend.release();  // a forked child has no such threads; the ring belongs to the parent
            return;
        }
        queue_.close();
        backend.reset();
        std::lock_guard lock(mutex_);
        files_.clear();
    }

    std::tuple<int64_t, int> open(const std::string& path, bool writable, bool create) {
        auto file = std::make_shared<File>();
        const int error = file->open(path, writable, create);
        if (error != 0) return {-1, error};
        if (file->direct_fd < 0) queue_.note("no O_DIRECT for " + path + ": it goes through the page cache");
        std::lock_guard lock(mutex_);
        backend().add_file(*file);
        const int64_t id = next_file_++;
        files_.emplace(id, std::move(file));
        return {id, 0};
    }

    void close_file(int64_t id) {
        const std::shared_ptr<File> file = find(id);
        interruptible([&](auto limit) { return queue_.wait_file_idle(*file, limit); });
        std::lock_guard lock(mutex_);
        if (files_.erase(id) != 0) backend().remove_file(*file);
    }

    int sync(int64_t id) {
        const std::shared_ptr<File> file = find(id);
        nb::gil_scoped_release release;
        return file->sync();
    }

    void register_buffer(uint64_t address, uint64_t bytes) {
        nb::gil_scoped_release release;
        std::lock_guard lock(mutex_);
        std::string note;
        queue_.while_idle([&] { note = backend().register_buffer(reinterpret_cast<char*>(address), bytes); });
        backend().notify();
        if (!note.empty()) queue_.note(note);
    }

    int64_t submit(bool write, const std::vector<ExtentArguments>& arguments) {
        std::vector<Extent> extents;
        extents.reserve(arguments.size());
        std::lock_guard lock(mutex_);
        for (const auto& [id, offset, bytes, address] : arguments) {
            const auto found = files_.find(id);
            if (found == files_.end()) throw std::invalid_argument("no open file has the id " + std::to_string(id));
            if (write && !found->second->writable)
                throw std::invalid_argument(found->second->path + " was opened for reading only");
            if (offset > INT64_MAX || bytes > INT64_MAX - offset) throw std::invalid_argument("extent beyond 2^63 bytes");
            if (address == 0 && bytes > 0) throw std::invalid_argument("extent with a null address");
            extents.push_back({found->second, offset, bytes, reinterpret_cast<char*>(address)});
        }
        const int64_t ticket = queue_.submit(write, std::move(extents));
        last_ticket_ = ticket;
        backend().notify();
        return ticket;
    }

    bool done(int64_t ticket) {
        check_ticket(ticket);
        return queue_.finished(ticket);
    }

    double wait(int64_t ticket) {
        check_ticket(ticket);
        const auto begin = Clock::now();
        interruptible([&](auto limit) { return queue_.wait_for(ticket, limit); });
        return std::chrono::duration<double>(Clock::now() - begin).count();
    }

    // (path, offset, wanted, got, errno) of a failed ticket.
    std::optional<std::tuple<std::string, uint64_t, uint64_t, uint64_t, int>> failure(int64_t ticket) {
        const std::optional<Failure> failure = queue_.failure(ticket);
        if (!failure) return std::nullopt;
        return std::make_tuple(failure->path, failure->offset, failure->wanted, failure->got, failure->error);
    }

    std::string path(int64_t id) { return find(id)->path; }
    const std::string& name() const { return name_; }
    const std::string& reason() const { return reason_; }
    std::vector<std::string> notes() { return queue_.notes(); }
    Counters counters() { return queue_.counters(); }
    void keep_log(bool keep) { queue_.keep_log(keep); }

    // (write, bytes, submitted, started, finished) of every ticket that has finished since the last call.
    std::vector<std::tuple<bool, uint64_t, double, double, double>> take_log() {
        std::vector<std::tuple<bool, uint64_t, double, double, double>> found;
        for (const Transfer& transfer : queue_.take_log())
            found.emplace_back(transfer.write, transfer.bytes, transfer.submitted, transfer.started, transfer.finished);
        return found;
    }

  private:
    Backend& backend() {
        if (!backend_) throw std::invalid_argument("the I/O engine is closed");
        return *backend_;
    }

    std::shared_ptr<File> find(int64_t id) {
        std::lock_guard lock(mutex_);
        const auto found = files_.find(id);
        if (found == files_.end()) throw std::invalid_argument("no open file has the id " + std::to_string(id));
        return found->second;
    }

    void check_ticket(int64_t ticket) {
        std::lock_guard lock(mutex_);
        if (ticket < 1 || ticket > last_ticket_)
            throw std::invalid_argument("no ticket has the number " + std::to_string(ticket));
    }

    // Repeats a bounded wait until it succeeds, without the GIL; between rounds Python may raise KeyboardInterrupt.
    template <typename Wait>
    static void interruptible(const Wait& wait) {
        for (;;) {
            {
                nb::gil_scoped_release release;
                if (wait(std::chrono::milliseconds(50))) return;
            }
            if (PyErr_CheckSignals() != 0) throw nb::python_error();
        }
    }

    Queue queue_;
    const pid_t process_;
    std::mutex mutex_;  // files, backend's existence; never held while waiting for the disk, register_buffer excepted
    std::unique_ptr<Backend> backend_;
    std::string name_, reason_;
    std::map<int64_t, std::shared_ptr<File>> files_;
    int64_t next_file_ = 1;
    int64_t last_ticket_ = 0;
};

}  // namespace

}  // namespace io

void register_io(nb::module_& m) {
    using namespace nb::literals;
    using io::Engine;
    using io::FaultPlan;

    nb::module_ sub = m.def_submodule("io", "Asynchronous disk I/O; use offload.residency.io.");

    nb::class_<FaultPlan>(sub, "FaultPlan")
        .def("__init__",
             [](FaultPlan* plan, uint64_t short_every, uint64_t short_bytes, uint64_t eagain_every, uint64_t eintr_every,
                uint64_t eio_at, uint64_t einval_direct_every, int setup_errno) {
                 new (plan) FaultPlan{short_every, short_bytes, eagain_every, eintr_every, eio_at, einval_direct_every, setup_errno};
             },
             nb::kw_only(), "short_every"_a = 0, "short_bytes"_a = 1000, "eagain_every"_a = 0, "eintr_every"_a = 0,
             "eio_at"_a = 0, "einval_direct_every"_a = 0, "setup_errno"_a = 0);

    nb::class_<Engine>(sub, "Engine")
        .def(nb::init<const std::string&, uint32_t, uint64_t, uint64_t, const FaultPlan&>(), "backend"_a, "queue_depth"_a,
             "request_bytes"_a, "staging_bytes"_a, "faults"_a)
        .def_prop_ro("usable", &Engine::usable)
        .def_prop_ro("backend", &Engine::name)
        .def_prop_ro("reason", &Engine::reason)
        .def_prop_ro("notes", &Engine::notes)
        .def_prop_ro("read_bytes", [](Engine& engine) { return engine.counters().read_bytes; })
        .def_prop_ro("write_bytes", [](Engine& engine) { return engine.counters().write_bytes; })
        .def_prop_ro("busy_seconds", [](Engine& engine) { return engine.counters().busy_seconds; })
        .def("open", &Engine::open, "path"_a, "writable"_a, "create"_a)
        .def("close_file", &Engine::close_file, "id"_a)
        .def("sync", &Engine::sync, "id"_a)
        .def("path", &Engine::path, "id"_a)
        .def("register_buffer", &Engine::register_buffer, "address"_a, "num_bytes"_a)
        .def("submit", &Engine::submit, "write"_a, "extents"_a)
        .def("done", &Engine::done, "ticket"_a)
        .def("wait", &Engine::wait, "ticket"_a)
        .def("keep_log", &Engine::keep_log, "keep"_a)
        .def("take_log", &Engine::take_log)
        .def("failure", &Engine::failure, "ticket"_a)
        .def("close", &Engine::close, nb::call_guard<nb::gil_scoped_release>());
}
