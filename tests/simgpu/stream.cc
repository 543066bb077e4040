#include "tests/simgpu/stream.h"

#include <pthread.h>
#include <signal.h>

#include <system_error>
#include <thread>

#include "tests/simgpu/simulation.h"

namespace simgpu {
namespace {

uint64_t next_id() {
  static std::atomic<uint64_t> id{1};
  return id.fetch_add(1);
}

// Starts a thread that takes none of the program's signals.
void start_thread(std::function<void()> body) {
  sigset_t all, before;
  sigfillset(&all);
  // A fault in a simulated kernel must still reach the program's handlers and debuggers.
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&all, signal);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  std::thread(std::move(body)).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace

void Gate::hold() {
  std::lock_guard lock(mutex_);
  ++holders_;
}

void Gate::release() {
  std::lock_guard lock(mutex_);
  if (holders_ > 0 && --holders_ == 0) opened_.notify_all();
}

void Gate::pass() {
  std::unique_lock lock(mutex_);
  opened_.wait(lock, [this] { return holders_ == 0; });
}

Gate& gate() {
  static auto* instance = new Gate;
  return *instance;
}

Stream::Stream(Context* context, Kind kind, unsigned flags, int priority)
    : context_(context), kind_(kind), flags_(flags), priority_(priority), id_(next_id()) {}

CompletionPtr Stream::push(Action action, std::vector<CompletionPtr> after) {
  std::lock_guard lock(mutex_);
  auto done = std::make_shared<Completion>();
  queue_.push_back({std::move(action), std::move(after), done});
  tail_ = done;
  if (!started_) {
    started_ = true;
    start_thread([self = shared_from_this()] { work(self); });
  }
  filled_.notify_one();
  return done;
}

CompletionPtr Stream::tail() {
  std::lock_guard lock(mutex_);
  return tail_;
}

void Stream::close() {
  std::lock_guard lock(mutex_);
  closing_ = true;
  filled_.notify_one();
}

bool Stream::next(Item* item) {
  std::unique_lock lock(mutex_);
  filled_.wait(lock, [this] { return !queue_.empty() || closing_; });
  if (queue_.empty()) return false;
  *item = std::move(queue_.front());
  queue_.pop_front();
  return true;
}

void Stream::work(std::shared_ptr<Stream> self) {
  pthread_setname_np(pthread_self(), "simgpu-stream");
  Item item;
  while (self->next(&item)) {
    for (const CompletionPtr& completion : item.after) completion->wait();
    gate().pass();
    // After a lasting error nothing of the context runs any more; what waits for it must still be
    // woken.
    if (self->context_->error() == CUDA_SUCCESS) {
      CUresult result = item.action();
      if (result != CUDA_SUCCESS) self->context_->fail(result);
    }
    item.action = nullptr;
    item.after.clear();
    item.done->finish();
    item.done.reset();
  }
}

}  // namespace simgpu
