#include "worker_pool.h"

#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace {

class WorkerPool {
  public:
    void run(int threads, const std::function<void()>& work) {
        std::lock_guard turn(turn_);
        {
            std::lock_guard lock(mutex_);
            while (started_ < threads - 1) {
                std::thread(&WorkerPool::loop, this, started_++).detach();
            }
            work_ = &work;
            wanted_ = running_ = threads - 1;
            ++generation_;
        }
        start_.notify_all();
        work();
        std::unique_lock lock(mutex_);
        done_.wait(lock, [&] { return running_ == 0; });
        work_ = nullptr;
    }

  private:
    void loop(int index) {
        uint64_t seen = 0;
        std::unique_lock lock(mutex_);
        for (;;) {
            start_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= wanted_) continue;  // this pass needs fewer threads
            const auto* work = work_;
            lock.unlock();
            (*work)();
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable start_, done_;
    const std::function<void()>* work_ = nullptr;
    int started_ = 0, wanted_ = 0, running_ = 0;
    uint64_t generation_ = 0;
};

// Never destroyed: its threads may outlive static destructors. A forked child has none of them and gets a pool of its own.
WorkerPool& pool() {
    static WorkerPool* current = nullptr;
    static pid_t process = 0;
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    if (process != ::getpid()) current = new WorkerPool, process = ::getpid();
    return *current;
}

}  // namespace

void run_on_workers(int threads, const std::function<void()>& work) {
    if (threads <= 1)
        work();
    else
        pool().run(threads, work);
}
