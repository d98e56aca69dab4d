// A few threads that wait for work, for kernels that run in short passes.
#pragma once

#include <functional>

// Runs `work` on `threads` threads at once, the caller's among them, and returns when all are done. Calls from several
// threads take turns. `work` must not throw.
void run_on_workers(int threads, const std::function<void()>& work);
