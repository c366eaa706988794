// The CUDA kernel of finish_step, run thread by thread on the CPU, against the serial C++ code:
// random requests, with end tokens by value and in a tensor, and with hidden rows of any alignment.
#include "finish_step_kernel.h"

// After torch's headers.
#include "cuda_on_cpu.h"

using namespace medusa_kernels;

namespace {

std::mt19937 rng(1);
int pick(int low, int high) { return low + static_cast<int>(rng() % (high - low + 1)); }
bool chance(int percent) { return pick(1, 100) <= percent; }

// What the cases were, so that none of it goes missing unseen.
int num_cases = 0, num_wide = 0, num_narrow = 0, num_done = 0, num_going_on = 0, num_eos_tensor = 0;

struct Launch {
    FinishArgs a;
    bool wide;
};
const Launch* params;
void kernel(char*) { gpu::finish_step_kernel(params->a, params->wide); }

// What a step writes.
struct State {
    std::vector<int32_t> max_tokens;
    std::vector<int64_t> root, report;
    std::vector<char> last_hidden, done;
    bool operator==(const State&) const = default;
};

void run_case() {
    FinishArgs a{};
    a.batch = pick(1, 5);
    a.columns = chance(10) ? pick(120, 300) : pick(1, 9);
    const int nodes = a.columns + pick(0, 3);
    std::vector<int32_t> accept_length(a.batch), last_node(a.batch);
    std::vector<int64_t> tokens(a.batch * a.columns), next_token(a.batch), eos(pick(0, 3));
    std::vector<char> finished(a.batch);
    State start;
    for (int64_t& token : tokens) token = pick(0, 9);
    for (int64_t& token : eos) token = pick(0, 9);
    for (int b = 0; b < a.batch; ++b) {
        accept_length[b] = pick(-1, a.columns - 1);  // -1: a padded request
        last_node[b] = pick(0, nodes - 1);
        next_token[b] = chance(15) ? -1 : pick(0, 9);
        finished[b] = chance(15);
        start.max_tokens.push_back(chance(10) ? pick(-1, 1)
                                              : accept_length[b] + pick(0, accept_length[b] + 8));
        start.root.push_back(-7);
    }
    start.report.assign(a.batch * (a.columns + 1), -7);
    start.done.assign(a.batch, 2);
    a.accept_length = accept_length.data();
    a.last_node = last_node.data();
    a.tokens = tokens.data();
    a.next_token = next_token.data();
    a.finished = reinterpret_cast<const bool*>(finished.data());
    a.num_eos = static_cast<int32_t>(eos.size());
    if (chance(50)) {
        a.eos = eos.data();
        a.eos_value[0] = 5;  // not one of them
        num_eos_tensor += a.num_eos > 0;
    } else {
        std::copy(eos.begin(), eos.end(), a.eos_value);
    }

    // Rows with gaps between them or not, of 16-byte vectors or of any bytes.
    const bool with_hidden = chance(80);
    const int unit = chance(60) ? 16 : pick(1, 8);
    const int skew = chance(80) ? 0 : pick(0, 15);
    std::vector<char> hidden;
    if (with_hidden) {
        a.row_bytes = unit * (chance(30) ? pick(1, 300) : pick(1, 20));
        a.hidden_stride_t = a.row_bytes + unit * pick(0, 2);
        a.hidden_stride_b = nodes * a.hidden_stride_t + unit * pick(0, 2);
        a.last_hidden_stride_b = a.row_bytes + unit * pick(0, 2);
        hidden.resize(a.batch * a.hidden_stride_b);
        for (char& byte : hidden) byte = static_cast<char>(rng());
        a.hidden = hidden.data();
        start.last_hidden.assign(a.batch * a.last_hidden_stride_b + 64, 7);
    }

    State expected = start, got = start;
    const auto put_into = [&](State& state) {
        a.max_tokens = state.max_tokens.data();
        a.root = state.root.data();
        a.report = state.report.data();
        a.done = reinterpret_cast<bool*>(state.done.data());
        if (with_hidden) a.last_hidden = state.last_hidden.data() + skew;
    };
    put_into(expected);
    finish_serially(a);
    put_into(got);
    const Launch launch{a, gpu::has_wide_rows(a)};
    params = &launch;
    cuda_on_cpu::run_grid(kernel, {a.batch, 1, 1}, pick(1, 5), gpu::kThreads, 0);
    if (got != expected) {
        std::printf("case %d differs: batch %d, %d columns, %d end tokens %s, rows of %ld bytes\n",
                    num_cases, a.batch, a.columns, a.num_eos, a.eos ? "in a tensor" : "by value",
                    static_cast<long>(a.row_bytes));
        std::exit(1);
    }
    ++num_cases;
    if (with_hidden) ++(launch.wide ? num_wide : num_narrow);
    for (const char done : got.done) ++(done ? num_done : num_going_on);
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 1;
    for (int round = 0; round < rounds; ++round) run_case();
    std::printf(
        "%d cases: rows %d wide, %d bytewise; requests %d done, %d going on; %d with end tokens in "
        "a tensor\n",
        num_cases, num_wide, num_narrow, num_done, num_going_on, num_eos_tensor);
    bool covered = true;
    for (const int count : {num_wide, num_narrow, num_done, num_going_on, num_eos_tensor})
        covered &= count * 10 > num_cases;
    return covered ? 0 : 3;
}
