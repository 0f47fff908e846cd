/* Gated experts of a few rows each, whose weights are read once and at the memory's rate.
 *
 * Shape suffixes: T tokens, R rows (choices of an expert, expert after expert), E experts, I, H and
 * O features of inputs, hidden layer and outputs, all three multiples of 16. Arrays are contiguous.
 * MOST_ROWS, of a segment, is defined by cpu.py.
 */
#include <stdint.h>

#ifdef __AVX512F__
#define WIDTH 16
#define BLOCK_ROWS 6
#else
#define WIDTH 8
#define BLOCK_ROWS 3
#endif

/* A block is as many inputs and outputs as have their sums in registers; a panel, the outputs whose
 * weights stay in the first cache while all rows are multiplied by them; a task, what a thread takes
 * at a time. */
#define BLOCK_OUTPUTS 4
#define PANEL_OUTPUTS 16
#define TASK_OUTPUTS 32

#define INLINE static inline __attribute__((always_inline))

#define UNROLLED _Pragma("GCC unroll 6")

typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t vector_of_int __attribute__((vector_size(4 * WIDTH)));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vector_of_int){__VA_ARGS__})
#endif
/* Of every four numbers of a and of b the first or the last two: in turn, or those of a first. */
#define LOW(i) i, i + WIDTH, i + 1, i + 1 + WIDTH
#define HIGH(i) LOW(i + 2)
#define FIRST(i) i, i + 1, i + WIDTH, i + WIDTH + 1
#define LAST(i) FIRST(i + 2)
#if WIDTH == 16
#define EACH(part) part(0), part(4), part(8), part(12)
#else
#define EACH(part) part(0), part(4)
#endif

/* The sums over a, b, c and d. */
INLINE quad sums(vector a, vector b, vector c, vector d) {
    vector ab = SHUFFLE(a, b, EACH(LOW)) + SHUFFLE(a, b, EACH(HIGH));
    vector cd = SHUFFLE(c, d, EACH(LOW)) + SHUFFLE(c, d, EACH(HIGH));
    union {
        vector whole;
        quad part[WIDTH / 4];
    } all = {SHUFFLE(ab, cd, EACH(FIRST)) + SHUFFLE(ab, cd, EACH(LAST))};
    quad total = all.part[0];
    for (int i = 1; i < WIDTH / 4; i++) total += all.part[i];
    return total;
}

/* outputs[r, o] = inputs[r] . weights[o], while some lines of later weights are brought near. Inlined
 * for each number of rows and lines: only then are the sums in registers. */
INLINE void block(const float *const *inputs, const int rows, const float *weights, int64_t size,
                  const float *later, const int lines, float *outputs, int64_t stride) {
    vector total[BLOCK_ROWS][BLOCK_OUTPUTS];
    UNROLLED for (int r = 0; r < rows; r++)
        for (int o = 0; o < BLOCK_OUTPUTS; o++) total[r][o] = (vector){0};
    for (int64_t i = 0; i < size; i += WIDTH) {
        for (int line = 0; line < lines; line++) __builtin_prefetch(later + line * size + i, 0, 2);
        vector weight[BLOCK_OUTPUTS];
        for (int o = 0; o < BLOCK_OUTPUTS; o++) weight[o] = *(const vector *)(weights + o * size + i);
        UNROLLED for (int r = 0; r < rows; r++) {
            vector input = *(const vector *)(inputs[r] + i);
            for (int o = 0; o < BLOCK_OUTPUTS; o++) total[r][o] += input * weight[o];
        }
    }
    UNROLLED for (int r = 0; r < rows; r++)
        *(quad *)(outputs + r * stride) = sums(total[r][0], total[r][1], total[r][2], total[r][3]);
}

#define WITH_LINES(ROWS)                                                                           \
    case ROWS:                                                                                     \
        switch (lines) {                                                                           \
        case 0: block(inputs, ROWS, weights, size, later, 0, outputs, stride); return;             \
        case 1: block(inputs, ROWS, weights, size, later, 1, outputs, stride); return;             \
        case 2: block(inputs, ROWS, weights, size, later, 2, outputs, stride); return;             \
        default: block(inputs, ROWS, weights, size, later, 4, outputs, stride); return;            \
        }

static void any_block(const float *const *inputs, int rows, const float *weights, int64_t size,
                      const float *later, int lines, float *outputs, int64_t stride) {
    switch (rows) {
        WITH_LINES(1)
        WITH_LINES(2)
        WITH_LINES(3)
#if BLOCK_ROWS > 3
        WITH_LINES(4)
        WITH_LINES(5)
        WITH_LINES(6)
#endif
    }
}

/* outputs[r, o] = inputs[r] . weights[o], o < number, a multiple of BLOCK_OUTPUTS. */
static void product(const float *const *inputs, int64_t rows, const float *weights, int64_t number,
                    int64_t size, float *outputs, int64_t stride) {
    int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    /* Each block of rows asks for some of the four lines that lie a panel later, so that memory is
     * read all the time. */
    int64_t lines = blocks >= 4 ? 1 : blocks >= 2 ? 2 : 4;
    for (int64_t panel = 0; panel < number; panel += PANEL_OUTPUTS) {
        int64_t end = panel + PANEL_OUTPUTS < number ? panel + PANEL_OUTPUTS : number;
        for (int64_t b = 0; b < blocks; b++) {
            int64_t row = b * rows / blocks, next_row = (b + 1) * rows / blocks;
            int64_t line = b * lines;
            for (int64_t o = panel; o < end; o += BLOCK_OUTPUTS)
                any_block(inputs + row, (int)(next_row - row), weights + o * size, size,
                          weights + (o + PANEL_OUTPUTS + line) * size,
                          line < BLOCK_OUTPUTS ? (int)lines : 0, outputs + row * stride + o, stride);
        }
    }
}

/* e to the x: a power of two, infinite for the largest, times a polynomial. Compilers turn it into
 * vectors, unlike expf. */
INLINE float exponential(float x) {
    float powers = x * 1.44269504f;
    powers = powers < -126.0f ? -126.0f : powers;
    powers = powers > 128.0f ? 128.0f : powers;
    union {
        float real;
        uint32_t bits;
    } shifted = {powers + 12582912.0f}, scale;
    float rest = (powers - (shifted.real - 12582912.0f)) * 0.693147181f;
    float value = 1.0f + rest * (1.0f + rest * (1.0f / 2 + rest * (1.0f / 6 + rest * (1.0f / 24
                  + rest * (1.0f / 120 + rest * (1.0f / 720))))));
    scale.bits = (shifted.bits + 127u) << 23;
    return value * scale.real;
}

static void activate(const float *restrict gate, const float *restrict up, int64_t number,
                     float *restrict hidden) {
    for (int64_t i = 0; i < number; i++)
        hidden[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

/* Rows of one expert, and the first of them in what is kept, which has no gaps. */
typedef struct {
    int64_t expert, start, rows, kept;
} segment;

/* outputs[R, O] = (SiLU(x expand[E, :H]^T) * (x expand[E, H:]^T)) contract[E]^T for each segment of
 * at most MOST_ROWS rows, with x[tokens[R]] of x[T, I], expand[E, 2 H, I] and contract[E, O, H].
 * What the first product gives is kept in expanded[all rows of segments, 2 H], unless that is null;
 * hidden is [2, MOST_ROWS, H] of memory to work in. */
void moecast_gated_ffn(const float *x, const int64_t *tokens, const segment *segments,
                       int64_t num_segments, const float *expand, const float *contract,
                       int64_t I, int64_t H, int64_t O, float *expanded, float *hidden,
                       float *outputs, int32_t num_threads) {
    int64_t hidden_tasks = (H + TASK_OUTPUTS - 1) / TASK_OUTPUTS;
    int64_t output_tasks = (O + TASK_OUTPUTS - 1) / TASK_OUTPUTS;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    /* Some experts at a time, so that the hidden layer stays in the cache. A thread that is ahead
     * writes the next ones' to the other half. */
    for (int64_t first = 0, end, half = 0; first < num_segments; first = end, half = !half) {
        float *group = hidden + half * MOST_ROWS * H;
        int64_t start = segments[first].start;
        for (end = first + 1; end < num_segments; end++)
            if (segments[end].start + segments[end].rows - start > MOST_ROWS) break;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < (end - first) * hidden_tasks; task++) {
            segment s = segments[first + task / hidden_tasks];
            int64_t h = task % hidden_tasks * TASK_OUTPUTS;
            int64_t number = H - h < TASK_OUTPUTS ? H - h : TASK_OUTPUTS;
            const float *inputs[MOST_ROWS], *weights = expand + (s.expert * 2 * H + h) * I;
            float here[2 * TASK_OUTPUTS * MOST_ROWS] __attribute__((aligned(64)));
            float *gates = expanded ? expanded + s.kept * 2 * H + h : here;
            float *ups = expanded ? gates + H : here + TASK_OUTPUTS;
            int64_t stride = expanded ? 2 * H : 2 * TASK_OUTPUTS;
            for (int64_t r = 0; r < s.rows; r++) inputs[r] = x + tokens[s.start + r] * I;
            product(inputs, s.rows, weights, number, I, gates, stride);
            product(inputs, s.rows, weights + H * I, number, I, ups, stride);
            for (int64_t r = 0; r < s.rows; r++)
                activate(gates + r * stride, ups + r * stride, number,
                         group + (s.start - start + r) * H + h);
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < (end - first) * output_tasks; task++) {
            segment s = segments[first + task / output_tasks];
            int64_t o = task % output_tasks * TASK_OUTPUTS;
            int64_t number = O - o < TASK_OUTPUTS ? O - o : TASK_OUTPUTS;
            const float *inputs[MOST_ROWS];
            for (int64_t r = 0; r < s.rows; r++) inputs[r] = group + (s.start - start + r) * H;
            product(inputs, s.rows, contract + (s.expert * O + o) * H, number, H,
                    outputs + s.start * O + o, O);
        }
    }
}
