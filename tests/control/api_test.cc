// The paths over a real engine and the simulated driver: what they do, answer and refuse.
#include "core/control/api.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <ctime>
#include <nlohmann/json.hpp>
#include <thread>

#include "core/control/metrics.h"
#include "core/sleep/gate.h"
#include "tests/core/simulated_engine.h"

namespace dormouse::control {
namespace {

using nlohmann::json;
using testing::HasSubstr;

class ApiTest : public SimulatedEngine {
 protected:
  void SetUp() override {
    SimulatedEngine::SetUp();
    ProcessInfo process = this_process();
    process.version = "1.2.3";
    process.options = {{"DORMOUSE_GATE", "wake", "DORMOUSE_GATE"}};
    api_ = std::make_unique<Api>(*engine, std::move(process));
    address_ = allocate(weights, 6 * kMiB);
    fill(address_, 6 * kMiB, 1);
  }
  void TearDown() override {
    EXPECT_EQ(engine->wake({}, nullptr).code(), Code::kOk);
    EXPECT_EQ(engine->free(address_), CUDA_SUCCESS);
    SimulatedEngine::TearDown();
  }

  Response post(const std::string& target) { return api_->handle({"POST", target, ""}); }
  Response get(const std::string& target) { return api_->handle({"GET", target, ""}); }

  static json body(const Response& response) { return json::parse(response.body, nullptr, false); }
  bool is_sleeping(const std::string& query = "") {
    const json answer = body(get("/is_sleeping" + query));
    return answer.at("is_sleeping").get<bool>();
  }
  json status() { return body(get("/status")); }

  /// The request is refused with this status, its message says `text`, and nothing happened.
  void expect_refusal(const Response& response, unsigned code, const std::string& error,
                      const std::string& text) {
    EXPECT_EQ(response.status, code) << response.body;
    EXPECT_EQ(body(response).at("error"), error);
    EXPECT_THAT(body(response).at("message").get<std::string>(), HasSubstr(text));
    EXPECT_FALSE(is_sleeping());
    EXPECT_TRUE(holds(address_, 6 * kMiB, 1));
  }

  std::unique_ptr<Api> api_;
  CUdeviceptr address_ = 0;
};

TEST_F(ApiTest, SleepAndWakeBringBackEveryByte) {
  const Response slept = post("/sleep");
  ASSERT_EQ(slept.status, 200u) << slept.body;
  EXPECT_EQ(body(slept).at("operation"), "sleep");
  EXPECT_GE(body(slept).at("bytes").get<std::uint64_t>(), 6 * kMiB);
  EXPECT_GT(body(slept).at("seconds").get<double>(), 0);
  EXPECT_TRUE(is_sleeping());
  EXPECT_TRUE(is_sleeping("?tags=weights"));
  EXPECT_FALSE(is_sleeping("?tags=kv_cache"));
  EXPECT_TRUE(is_sleeping("?tags=kv_cache,weights"));

  const Response woken = post("/wake_up");
  ASSERT_EQ(woken.status, 200u) << woken.body;
  EXPECT_EQ(body(woken).at("operation"), "wake");
  EXPECT_EQ(body(woken).at("bytes"), body(slept).at("bytes"));
  EXPECT_FALSE(is_sleeping());
  EXPECT_TRUE(holds(address_, 6 * kMiB, 1));
}

TEST_F(ApiTest, SleepFromOutsideClosesTheGateUntilTheWake) {
  ASSERT_EQ(post("/sleep").status, 200u);
  EXPECT_TRUE(gate::is_closed());
  EXPECT_EQ(status().at("gate").at("closed"), true);
  ASSERT_EQ(post("/wake").status, 200u);
  EXPECT_FALSE(gate::is_closed());
}

TEST_F(ApiTest, AnOperationWhoseClientHasGoneIsNotBegun) {
  for (const char* target : {"/sleep", "/wake", "/trim"}) {
    const Response dropped = api_->handle({"POST", target, "", [] { return true; }});
    EXPECT_EQ(dropped.status, 409u) << dropped.body;
  }
  EXPECT_FALSE(is_sleeping());
}

TEST_F(ApiTest, TagsChooseWhatSleeps) {
  const CUdeviceptr cache = allocate(kv_cache, 2 * kMiB);
  ASSERT_EQ(post("/sleep?tags=kv_cache").status, 200u);
  EXPECT_FALSE(is_sleeping("?tags=weights"));
  EXPECT_TRUE(is_sleeping("?tags=kv_cache"));
  ASSERT_EQ(post("/sleep?tags=weights&tags=kv_cache").status, 200u);
  EXPECT_TRUE(is_sleeping("?tags=weights"));
  ASSERT_EQ(post("/wake_up?tags=weights%2Ckv_cache").status, 200u);
  EXPECT_FALSE(is_sleeping());
  EXPECT_EQ(engine->free(cache), CUDA_SUCCESS);
}

TEST_F(ApiTest, Level2AndDiscardDropTheContent) {
  for (const char* target : {"/sleep?level=2", "/sleep?discard=true", "/sleep?level=1&discard=1"}) {
    fill(address_, 6 * kMiB, 1);
    ASSERT_EQ(post(target).status, 200u) << target;
    ASSERT_EQ(post("/wake_up").status, 200u);
    EXPECT_TRUE(is_zero(address_, 6 * kMiB)) << target;
  }
}

TEST_F(ApiTest, Level1KeepsTheContent) {
  ASSERT_EQ(post("/sleep?level=1&discard=false").status, 200u);
  ASSERT_EQ(post("/wake_up").status, 200u);
  EXPECT_TRUE(holds(address_, 6 * kMiB, 1));
}

TEST_F(ApiTest, BytesEndASleepEarly) {
  std::vector<CUdeviceptr> blocks;
  for (int i = 0; i < 4; ++i) blocks.push_back(allocate(weights, 8 * kMiB));
  const Response slept = post("/sleep?bytes=6MiB");
  ASSERT_EQ(slept.status, 200u) << slept.body;
  const json tag = status().at("tags").at(0);
  EXPECT_GE(tag.at("asleep").get<std::uint64_t>(), 6 * kMiB);
  EXPECT_GT(tag.at("mapped").get<std::uint64_t>(), 0u);
  ASSERT_EQ(post("/wake_up").status, 200u);
  for (const CUdeviceptr block : blocks) EXPECT_EQ(engine->free(block), CUDA_SUCCESS);
}

TEST_F(ApiTest, IdempotentOperationsSucceedAgain) {
  ASSERT_EQ(post("/wake_up").status, 200u);
  ASSERT_EQ(post("/sleep").status, 200u);
  const Response again = post("/sleep");
  EXPECT_EQ(again.status, 200u);
  EXPECT_EQ(body(again).at("bytes"), 0);
  ASSERT_EQ(post("/wake_up").status, 200u);
  EXPECT_EQ(post("/wake_up").status, 200u);
}

TEST_F(ApiTest, AnUnknownTagIsNotFound) {
  expect_refusal(post("/sleep?tags=wieghts"), 404, "not_found", "wieghts");
  expect_refusal(post("/sleep?tags=weights,nope"), 404, "not_found", "nope");
  expect_refusal(post("/wake_up?tags=nope"), 404, "not_found", "nope");
  expect_refusal(get("/is_sleeping?tags=nope"), 404, "not_found", "nope");
}

TEST_F(ApiTest, MistypedParametersNeverMeanEverything) {
  for (const char* target : {"/sleep?tag=weights", "/sleep?Tags=weights", "/sleep?tags=",
                             "/sleep?tags=,", "/sleep?tags", "/sleep?x", "/sleep?=weights"}) {
    SCOPED_TRACE(target);
    expect_refusal(post(target), 400, "invalid_argument", "");
  }
}

TEST_F(ApiTest, MalformedValuesAreRefused) {
  for (const char* target :
       {"/sleep?level=0", "/sleep?level=3", "/sleep?level=", "/sleep?level=1&level=2",
        "/sleep?bytes=", "/sleep?bytes=-1", "/sleep?bytes=much", "/sleep?bytes=0",
        "/sleep?bytes=99999999999999TiB", "/sleep?discard=yes",
        "/sleep?discard=", "/sleep?tags=%zz", "/wake_up?level=1", "/wake_up?bytes=1GiB",
        "/trim?backups=maybe", "/trim?tags=weights"}) {
    SCOPED_TRACE(target);
    expect_refusal(post(target), 400, "invalid_argument", "");
  }
  expect_refusal(get("/status?verbose=1"), 400, "invalid_argument", "verbose");
}

TEST_F(ApiTest, AnUnknownParameterIsToldWhichThereAre) {
  expect_refusal(post("/sleep?tag=weights"), 400, "invalid_argument",
                 "unknown parameter 'tag'; /sleep takes tags, discard, bytes, level");
  expect_refusal(post("/wake_up?x"), 400, "invalid_argument", "/wake_up takes tags");
  expect_refusal(post("/trim?x"), 400, "invalid_argument", "/trim takes backups");
  expect_refusal(get("/status?x"), 400, "invalid_argument", "/status takes none");
}

TEST_F(ApiTest, ABodyIsRefusedSinceItsTagsWouldBeIgnored) {
  expect_refusal(api_->handle({"POST", "/sleep", R"({"tags": ["kv_cache"]})"}), 400,
                 "invalid_argument", "query");
}

TEST_F(ApiTest, UnknownPathsAndWrongMethodsAreRefused) {
  expect_refusal(post("/sleeep"), 404, "not_found", "/sleep");
  expect_refusal(post("/"), 404, "not_found", "/sleep");
  expect_refusal(post("/sleep/"), 404, "not_found", "no such path");
  for (const char* path : {"/sleep", "/wake_up", "/wake", "/trim"}) {
    expect_refusal(get(path), 405, "method_not_allowed", "POST");
    EXPECT_EQ(get(path).allow, "POST");
  }
  for (const char* path : {"/status", "/metrics", "/health", "/is_sleeping"}) {
    expect_refusal(post(path), 405, "method_not_allowed", "GET");
  }
  expect_refusal(api_->handle({"DELETE", "/sleep", ""}), 405, "method_not_allowed", "POST");
}

TEST_F(ApiTest, AWakeWithoutMemoryIsStatus507AndCanBeTriedAgain) {
  ASSERT_EQ(post("/sleep").status, 200u);
  ASSERT_EQ(simgpu_fail_at("cuMemCreate", 0, CUDA_ERROR_OUT_OF_MEMORY), 0);
  const Response failed = post("/wake_up");
  simgpu_clear_failures();
  EXPECT_EQ(failed.status, 507u) << failed.body;
  EXPECT_EQ(body(failed).at("error"), "out_of_device_memory");
  EXPECT_TRUE(is_sleeping());
  ASSERT_EQ(post("/wake_up").status, 200u);
  EXPECT_TRUE(holds(address_, 6 * kMiB, 1));
}

TEST_F(ApiTest, ACaptureInTheWayIsStatus409) {
  engine->capture_begins();
  expect_refusal(post("/sleep"), 409, "busy", "captur");
  engine->capture_ended();
  EXPECT_EQ(post("/sleep").status, 200u);
}

TEST_F(ApiTest, TrimReleasesWhatIsHeldButNotUsed) {
  EngineOptions options = small_options();
  options.retain_bytes = 256 * kMiB;
  EXPECT_EQ(engine->free(address_), CUDA_SUCCESS);
  restart(options);
  api_ = std::make_unique<Api>(*engine, ProcessInfo());
  address_ = allocate(weights, 6 * kMiB);
  fill(address_, 6 * kMiB, 1);
  const CUdeviceptr block = allocate(weights, 32 * kMiB);  // a chunk of its own
  EXPECT_EQ(engine->free(block), CUDA_SUCCESS);
  const auto mapped = [this] {
    return status().at("tags").at(0).at("mapped").get<std::uint64_t>();
  };
  const std::uint64_t before = mapped();
  EXPECT_EQ(post("/trim?backups=true").status, 200u);
  EXPECT_LT(mapped(), before);
  EXPECT_TRUE(holds(address_, 6 * kMiB, 1));
}

TEST_F(ApiTest, StatusHasEveryFigure) {
  ASSERT_EQ(post("/sleep").status, 200u);
  const json now = status();
  EXPECT_EQ(now.at("pid"), getpid());
  EXPECT_EQ(now.at("version"), "1.2.3");
  EXPECT_THAT(now.at("command").get<std::string>(), HasSubstr("api_test"));
  const double age = static_cast<double>(std::time(nullptr)) - now.at("start_time").get<double>();
  EXPECT_GE(age, -2);
  EXPECT_LE(age, 600);
  ASSERT_EQ(now.at("tags").size(), 1u);
  const json& tag = now.at("tags").at(0);
  const TagStats stats = stats_of("weights");
  EXPECT_EQ(tag.at("tag"), "weights");
  EXPECT_EQ(tag.at("backup"), "host");
  EXPECT_EQ(tag.at("device"), 0);
  EXPECT_EQ(tag.at("allocated"), stats.allocated);
  EXPECT_EQ(tag.at("mapped"), stats.mapped);
  EXPECT_EQ(tag.at("asleep"), stats.asleep);
  EXPECT_EQ(tag.at("backed_up"), stats.backed_up);
  EXPECT_EQ(tag.at("on_disk"), stats.on_disk);
  EXPECT_EQ(tag.at("peak_allocated"), stats.peak_allocated);
  EXPECT_EQ(tag.at("peak_mapped"), stats.peak_mapped);
  EXPECT_EQ(tag.at("blocks"), 1);
  EXPECT_EQ(tag.at("chunks"), stats.chunks);
  EXPECT_EQ(tag.at("allocations"), 1);
  EXPECT_EQ(tag.at("frees"), 0);
  EXPECT_EQ(tag.at("sleeps"), 1);
  EXPECT_EQ(tag.at("wakes"), 0);
  EXPECT_EQ(tag.at("last_sleep").at("bytes"), stats.last_sleep.bytes);
  EXPECT_GT(tag.at("last_sleep").at("unix_time").get<double>(), 1.6e9);
  EXPECT_EQ(tag.at("last_wake").at("unix_time"), 0);
  EXPECT_EQ(now.at("devices").at(0).at("asleep"), stats.asleep);
  EXPECT_EQ(now.at("devices").at(0).at("on_disk"), stats.on_disk);
  EXPECT_EQ(now.at("progress").at("active"), false);
}

TEST_F(ApiTest, StatusHasTheOptionsThatDifferFromTheirDefaults) {
  const json expected = {
      {{"name", "DORMOUSE_GATE"}, {"value", "wake"}, {"variable", "DORMOUSE_GATE"}}};
  EXPECT_EQ(status().at("options"), json::array({expected.at(0)}));
}

TEST_F(ApiTest, AWakeThatFindsOtherContentSaysHowMuch) {
  EXPECT_EQ(engine->free(address_), CUDA_SUCCESS);
  EngineOptions options = small_options();
  options.verify = true;
  restart(options);
  api_ = std::make_unique<Api>(*engine, ProcessInfo());
  address_ = allocate(weights, 6 * kMiB);
  fill(address_, 6 * kMiB, 1);
  ASSERT_EQ(post("/sleep").status, 200u);
  EXPECT_EQ(body(post("/wake_up")).at("differing_bytes"), 0);
  ASSERT_EQ(post("/sleep").status, 200u);
  *static_cast<char*>(const_cast<void*>(engine->host_backup(address_ + 3 * kMiB, 1))) ^= 4;
  const Response woken = post("/wake_up");
  EXPECT_EQ(woken.status, 200u) << "it is awake";
  EXPECT_EQ(body(woken).at("differing_bytes"), 256 * 1024);
  EXPECT_EQ(status().at("tags").at(0).at("last_wake").at("differing_bytes"), 256 * 1024);
  EXPECT_THAT(get("/metrics").body,
              testing::ContainsRegex("dormouse_last_wake_differing_bytes[{].*[}] 262144\n"));
}

TEST_F(ApiTest, StatusAnswersWhileAnOperationRuns) {
  simgpu_hold_streams();  // the sleep waits for the device
  std::thread sleeper([this] { EXPECT_EQ(post("/sleep").status, 200u); });
  json progress = json::object();
  for (int i = 0; i < 5000 && !progress.value("active", false); ++i) {
    progress = status().at("progress");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(progress.value("operation", ""), "sleep");
  EXPECT_EQ(get("/metrics").status, 200u);
  EXPECT_EQ(get("/is_sleeping").status, 200u);
  simgpu_release_streams();
  sleeper.join();
  EXPECT_EQ(status().at("progress").at("active"), false);
}

TEST_F(ApiTest, OperationsBeyondALimitAreBusyAndTheOthersAreDone) {
  simgpu_hold_streams();
  std::atomic<int> done{0}, busy{0};
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([&] {
      const unsigned code = post("/sleep").status;
      if (code == 200) done.fetch_add(1);
      if (code == 409) busy.fetch_add(1);
    });
  }
  for (int i = 0; i < 5000 && busy < 4; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(busy.load(), 4);
  simgpu_release_streams();
  for (std::thread& thread : clients) thread.join();
  EXPECT_EQ(done.load(), 4);
  EXPECT_EQ(post("/wake_up").status, 200u);
}

TEST_F(ApiTest, MetricsShowTheEngine) {
  ASSERT_EQ(post("/sleep").status, 200u);
  const Response page = get("/metrics");
  EXPECT_EQ(page.content_type, kMetricsContentType);
  EXPECT_THAT(page.body,
              HasSubstr("dormouse_sleeps_total{tag=\"weights\",device=\"0\",backup=\"host\"} 1"));
  EXPECT_THAT(page.body, HasSubstr("dormouse_gate_closed 1\n"));
}

TEST_F(ApiTest, HealthIsOk) {
  EXPECT_EQ(get("/health").status, 200u);
  EXPECT_EQ(body(get("/health")).at("status"), "ok");
}

}  // namespace
}  // namespace dormouse::control
