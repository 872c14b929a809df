// Many calls back to back without any disturbance: y is right in every one, and nobody fails.
// Arguments: seed, calls, ranks, blocks, cluster (blocks of one), patience_ms (deadline of every wait), limit_s (of the run).
#include "program.hpp"

void megamoe::machine::observe(const void* address, Scope scope) { protocol::check_scope(address, scope); }

int main(int argc, char** argv) {
  using namespace protocol;
  const Arguments arguments(argc, argv);
  end_after(static_cast<uint32>(arguments.number("limit_s")));
  World world(static_cast<uint32>(arguments.number("ranks")), static_cast<uint32>(arguments.number("blocks")),
              static_cast<uint32>(arguments.number("cluster")), arguments.number("seed"), arguments.number("patience_ms") * 1000000);
  world_under_test = &world;
  run_good_calls(world, static_cast<uint32>(arguments.number("calls")));
  std::printf("ok\n");
}
