/* Views on CPU, one image after the other, each while it is in cache.
 *
 * Every line does what `resample.py` and `color.py` do on whole batches with torch, in the same
 * order of operations, so that both give the same bytes: sums are of integers that float32 holds
 * exactly, the rest is elementwise IEEE arithmetic. Built without contraction to fused
 * multiply-add, which would round differently. No state, no threads.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE4_1__)
#include <smmintrin.h>
#endif

#define UNIT 2048.0          /* weights are integers over this */
#define FINE 8.0f            /* steps of a gray level kept between passes */
#define FULL 2040.0f         /* 255 * FINE */
#define ROUND 12582912.0f    /* x + ROUND - ROUND rounds |x| < 2^22 to even */
#define BLOCK 1024           /* pixels whose three channels stay in L1 */

/* Vectors as wide as the machine's: of four floats, or of eight, which are two rows of four. */
#if defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define ROWS (LANES / 4)
typedef uint8_t u4 __attribute__((vector_size(4)));
typedef float v4 __attribute__((vector_size(16)));
typedef float wide __attribute__((vector_size(4 * LANES)));
typedef float wide_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t indices __attribute__((vector_size(4 * LANES)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (indices){__VA_ARGS__})
#endif
/* Of each row of four lanes, in a and in b: lanes i, j of a and k, l of b. */
#if LANES == 8
#define PICK(a, b, i, j, k, l) \
    SHUFFLE(a, b, i, j, 8 + k, 8 + l, 4 + i, 4 + j, 12 + k, 12 + l)
#else
#define PICK(a, b, i, j, k, l) SHUFFLE(a, b, i, j, 4 + k, 4 + l)
#endif

static const float TO_UNIT = (float)(1.0 / 255.0), FROM_FULL = (float)(1.0 / 2040.0);
static const float LUMA_R = 0.299f, LUMA_G = 0.587f, LUMA_B = 0.114f;

/* ---------------------------------------------------------------- weighted sums */

/* to[x] = the rounded `scale` times the sum over t of weight[t] * from[t * stride + x], then times
 * `unit`. Sums are of integers, so of any order; they are kept in registers, since in memory each
 * weight would cost a load and a store of them. */
static void weigh(const float *weight, int count, const float *from, int64_t stride, int num,
                  float scale, float unit, float *restrict to)
{
    int x = 0;
    for (; x + 4 * LANES <= num; x += 4 * LANES) {
        wide a = {0}, b = {0}, c = {0}, d = {0};
        for (int t = 0; t < count; t++) {
            const wide_anywhere *at = (const wide_anywhere *)(from + t * stride + x);
            a += at[0] * weight[t], b += at[1] * weight[t];
            c += at[2] * weight[t], d += at[3] * weight[t];
        }
        wide_anywhere *put = (wide_anywhere *)(to + x);
        put[0] = (a * scale + ROUND - ROUND) * unit, put[1] = (b * scale + ROUND - ROUND) * unit;
        put[2] = (c * scale + ROUND - ROUND) * unit, put[3] = (d * scale + ROUND - ROUND) * unit;
    }
    for (; x < num; x++) {
        float sum = 0.0f;
        for (int t = 0; t < count; t++)
            sum += from[t * stride + x] * weight[t];
        to[x] = (sum * scale + ROUND - ROUND) * unit;
    }
}

/* ---------------------------------------------------------------- crop and resize */

static double cubic(double x)
{
    if (x < 1.0)
        return (1.5 * x - 2.5) * x * x + 1.0;
    return x < 2.0 ? ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 : 0.0;
}

static int taps_of(int64_t length, int size)
{
    double reach = (double)length / size;
    return 2 * (int)ceil(2.0 * (reach > 1.0 ? reach : 1.0)) + 1;
}

/* Weights of each output pixel over input pixels lo .. lo + count - 1 (`bicubic_weights`). */
static void band(int64_t start, int64_t length, int size, int taps, int32_t *lo, int32_t *count,
                 float *weights, double *raw)
{
    double scale = (double)length / size, reach = scale > 1.0 ? scale : 1.0;
    for (int i = 0; i < size; i++) {
        double centre = (double)start + (i + 0.5) * scale, sum = 0.0, lost = UNIT;
        int64_t first = (int64_t)floor(centre) - taps / 2, last = first + taps;
        first = first < start ? start : first;
        last = last > start + length ? start + length : last;
        for (int64_t p = first; p < last; p++)
            sum += raw[p - first] = cubic(fabs((double)p + 0.5 - centre) / reach);
        float *w = weights + (int64_t)i * taps;
        int most = 0;
        for (int t = 0; t < last - first; t++) {
            double whole = rint(raw[t] / sum * UNIT);
            lost -= whole;
            w[t] = (float)whole;
            most = w[t] > w[most] ? t : most;
        }
        w[most] += (float)lost;
        int from = 0, to = (int)(last - first);
        while (to > from + 1 && w[to - 1] == 0.0f)
            to--;
        while (from < to - 1 && w[from] == 0.0f)
            from++;
        if (from)
            memmove(w, w + from, (to - from) * sizeof *w);
        lo[i] = (int32_t)(first + from);
        count[i] = to - from;
    }
}

typedef struct {
    int32_t *lo_x, *lo_y, *count_x, *count_y;
    float *x, *y;   /* weights */
    double *raw;
    v4 *row;        /* [w, ROWS] */
    float *mid;     /* [channels, h, size] */
    float *line;    /* [size] */
} Crop;

static void free_crop(Crop *c)
{
    free(c->lo_x), free(c->lo_y), free(c->count_x), free(c->count_y), free(c->x), free(c->y);
    free(c->raw), free(c->row), free(c->mid), free(c->line);
}

static int make_crop(Crop *c, int size, int channels, int64_t h, int64_t w)
{
    int taps_y = taps_of(h, size), taps_x = taps_of(w, size);
    size_t most = taps_x > taps_y ? taps_x : taps_y;
    c->lo_x = malloc(size * sizeof *c->lo_x), c->lo_y = malloc(size * sizeof *c->lo_y);
    c->count_x = malloc(size * sizeof *c->count_x), c->count_y = malloc(size * sizeof *c->count_y);
    c->x = malloc((size_t)size * taps_x * sizeof *c->x);
    c->y = malloc((size_t)size * taps_y * sizeof *c->y);
    c->raw = malloc(most * sizeof *c->raw), c->row = malloc(ROWS * w * sizeof *c->row);
    c->mid = malloc((size_t)channels * h * size * sizeof *c->mid);
    c->line = malloc(size * sizeof *c->line);
    return c->lo_x && c->lo_y && c->count_x && c->count_y && c->x && c->y && c->raw && c->row &&
           c->mid && c->line;
}

/* Four bytes as floats; compilers take it for four conversions. */
static inline v4 floats_of(const uint8_t *p)
{
#if defined(__SSE4_1__)
    int32_t bits;
    memcpy(&bits, p, sizeof bits);
    return (v4)_mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bits)));
#else
    u4 four;
    memcpy(&four, p, sizeof four);
    return __builtin_convertvector(four, v4);
#endif
}

/* Put a row of pixels, red, green, blue and one that does not matter, ROWS places apart. */
static void widen(const uint8_t *restrict p, int64_t w, v4 *restrict to)
{
    for (int64_t i = 0; i < w - 1; i++) /* a byte of the next pixel is read */
        to[ROWS * i] = floats_of(p + 3 * i);
    p += 3 * (w - 1);
    to[ROWS * (w - 1)] = (v4){p[0], p[1], p[2], 0.0f};
}

static inline wide resampled(const Crop *c, int x, int64_t left, int taps)
{
    const float *weight = c->x + (int64_t)x * taps;
    const wide_anywhere *from = (const wide_anywhere *)(c->row + ROWS * (c->lo_x[x] - left));
    wide sum = {0};
    for (int t = 0; t < c->count_x[x]; t++)
        sum += from[t] * weight[t];
    return sum * (float)(FINE / UNIT) + ROUND - ROUND;
}

/* As many rows at a time as a vector holds: pixels of one place are one vector, and four places are
 * turned into runs of four reds, greens and blues. */
static void across(const Crop *c, const uint8_t *pixels, int64_t stride, const int64_t *box,
                   int flip, int size, int taps)
{
    int64_t top = box[0], left = box[1], h = box[2], w = box[3], plane = h * size;
    int step = flip ? -1 : 1;
    for (int64_t y = 0; y < h; y += ROWS) {
        float *to[ROWS];
        for (int64_t r = 0; r < ROWS; r++) {
            int64_t row = y + r < h ? y + r : h - 1; /* of an odd height the last one twice */
            widen(pixels + (top + row) * stride + 3 * left, w, c->row + r);
            to[r] = c->mid + row * size;
        }
        int at = 0, x = flip ? size - 1 : 0;
        for (; at + 4 <= size; at += 4, x += 4 * step) {
            wide p0 = resampled(c, x, left, taps), p1 = resampled(c, x + step, left, taps);
            wide p2 = resampled(c, x + 2 * step, left, taps);
            wide p3 = resampled(c, x + 3 * step, left, taps);
            wide rg01 = PICK(p0, p1, 0, 1, 0, 1), rg23 = PICK(p2, p3, 0, 1, 0, 1);
            wide b01 = PICK(p0, p1, 2, 3, 2, 3), b23 = PICK(p2, p3, 2, 3, 2, 3);
            wide color[3] = {PICK(rg01, rg23, 0, 2, 0, 2), PICK(rg01, rg23, 1, 3, 1, 3),
                             PICK(b01, b23, 0, 2, 0, 2)};
            for (int k = 0; k < 3; k++)
                for (int r = 0; r < ROWS; r++)
                    memcpy(to[r] + k * plane + at, (float *)&color[k] + 4 * r, sizeof(v4));
        }
        for (; at < size; at++, x += step) {
            wide sum = resampled(c, x, left, taps);
            for (int k = 0; k < 3; k++)
                for (int r = 0; r < ROWS; r++)
                    to[r][k * plane + at] = sum[4 * r + k];
        }
    }
}

/* Up to four channels, `many` from `first` on, of pixels that have `channels`: what is no RGB. */
static void across_some(const Crop *c, const uint8_t *pixels, int64_t stride, const int64_t *box,
                        int flip, int size, int taps, int channels, int first, int many)
{
    int64_t top = box[0], left = box[1], h = box[2], w = box[3], plane = h * size;
    for (int64_t y = 0; y < h; y++) {
        const uint8_t *p = pixels + (top + y) * stride + channels * left + first;
        for (int64_t i = 0; i < w; i++, p += channels)
            c->row[i] = (v4){p[0], many > 1 ? p[1] : 0.0f, many > 2 ? p[2] : 0.0f,
                             many > 3 ? p[3] : 0.0f};
        float *to = c->mid + first * plane + y * size;
        for (int x = 0; x < size; x++) {
            const float *weight = c->x + (int64_t)x * taps;
            const v4 *from = c->row + (c->lo_x[x] - left);
            v4 sum = {0};
            for (int t = 0; t < c->count_x[x]; t++)
                sum += from[t] * weight[t];
            sum = sum * (float)(FINE / UNIT) + ROUND - ROUND;
            int at = flip ? size - 1 - x : x;
            for (int k = 0; k < many; k++)
                to[k * plane + at] = sum[k];
        }
    }
}

static void down(const Crop *c, int64_t top, int64_t h, int size, int channels, int taps,
                 uint8_t *restrict out)
{
    float *restrict line = c->line;
    for (int channel = 0; channel < channels; channel++)
        for (int y = 0; y < size; y++) {
            const float *weight = c->y + (int64_t)y * taps;
            const float *from = c->mid + ((channel * h) + c->lo_y[y] - top) * size;
            weigh(weight, c->count_y[y], from, size, size, (float)(1.0 / (UNIT * FINE)), 1.0f, line);
            uint8_t *restrict to = out + ((int64_t)channel * size + y) * size;
            for (int x = 0; x < size; x++) {
                float v = line[x] > 0.0f ? line[x] : 0.0f;
                to[x] = (uint8_t)(int32_t)(v < 255.0f ? v : 255.0f);
            }
        }
}

/* pixels: n images [H, W, channels]; widths [n]; boxes [n, 4] of top, left, height, width;
 * flip [n]; out [n, channels, size, size]. Returns 0, or 1 without memory. */
int crop_views(int64_t n, const uint8_t *const *pixels, const int64_t *widths,
               const int64_t *boxes, const uint8_t *flip, int32_t size, int32_t channels,
               uint8_t *out)
{
    for (int64_t i = 0; i < n; i++) {
        const int64_t *box = boxes + 4 * i;
        int taps_y = taps_of(box[2], size), taps_x = taps_of(box[3], size);
        Crop c;
        if (!make_crop(&c, size, channels, box[2], box[3])) {
            free_crop(&c);
            return 1;
        }
        band(box[0], box[2], size, taps_y, c.lo_y, c.count_y, c.y, c.raw);
        band(box[1], box[3], size, taps_x, c.lo_x, c.count_x, c.x, c.raw);
        int64_t stride = channels * widths[i];
        if (channels == 3)
            across(&c, pixels[i], stride, box, flip[i], size, taps_x);
        for (int first = 0; channels != 3 && first < channels; first += 4) {
            int many = channels - first < 4 ? channels - first : 4;
            across_some(&c, pixels[i], stride, box, flip[i], size, taps_x, channels, first, many);
        }
        down(&c, box[0], box[2], size, channels, taps_y, out + i * channels * size * size);
        free_crop(&c);
    }
    return 0;
}

/* ---------------------------------------------------------------- color */

static inline float unit(float x)
{
    x = x > 0.0f ? x : 0.0f; /* the order in which this is one instruction */
    return x < 1.0f ? x : 1.0f;
}

static inline float luma(float r, float g, float b)
{
    return r * LUMA_R + g * LUMA_G + b * LUMA_B;
}

static inline float floored(float x) /* |x| < 2^22; floorf is a call on some machines */
{
    float whole = x + ROUND - ROUND;
    return whole > x ? whole - 1.0f : whole;
}

static void brightness(float *restrict r, float *restrict g, float *restrict b, int m, float f)
{
    for (int i = 0; i < m; i++)
        r[i] = unit(r[i] * f), g[i] = unit(g[i] * f), b[i] = unit(b[i] * f);
}

static int64_t luma_steps(const float *restrict r, const float *restrict g,
                          const float *restrict b, int m)
{
    int32_t sum = 0; /* of at most BLOCK * 4097 */
    for (int i = 0; i < m; i++)
        sum += (int32_t)(luma(r[i], g[i], b[i]) * 4096.0f + ROUND - ROUND);
    return sum;
}

static void contrast(float *restrict r, float *restrict g, float *restrict b, int m, float f,
                     float mean)
{
    float rest = (1.0f - f) * mean;
    for (int i = 0; i < m; i++) {
        r[i] = unit(f * r[i] + rest);
        g[i] = unit(f * g[i] + rest);
        b[i] = unit(f * b[i] + rest);
    }
}

static void saturation(float *restrict r, float *restrict g, float *restrict b, int m, float f)
{
    float other = 1.0f - f;
    for (int i = 0; i < m; i++) {
        float gray = other * luma(r[i], g[i], b[i]);
        r[i] = unit(f * r[i] + gray);
        g[i] = unit(f * g[i] + gray);
        b[i] = unit(f * b[i] + gray);
    }
}

static void hue(float *restrict r, float *restrict g, float *restrict b, int m, float shift)
{
    float turn = shift * 6.0f;
    for (int i = 0; i < m; i++) {
        float red = r[i], green = g[i], blue = b[i];
        float most = red > green ? red : green, least = red < green ? red : green;
        most = most > blue ? most : blue, least = least < blue ? least : blue;
        float chroma = most - least, safe = chroma > 0.0f ? chroma : 1.0f;
        float part = most == green ? blue - red : red - green, base = most == green ? 2.0f : 4.0f;
        part = most == red ? green - blue : part, base = most == red ? 0.0f : base;
        float u = part / safe + base + turn;
        u = u - floored(u * (float)(1.0 / 6.0)) * 6.0f;
        r[i] = unit(unit(fabsf(u - 3.0f) - 1.0f) * chroma + least);
        g[i] = unit(unit(2.0f - fabsf(u - 2.0f)) * chroma + least);
        b[i] = unit(unit(2.0f - fabsf(u - 4.0f)) * chroma + least);
    }
}

static void apply(int op, float *r, float *g, float *b, int m, const float *factors, float mean)
{
    switch (op) {
    case 0: brightness(r, g, b, m, factors[0]); break;
    case 1: contrast(r, g, b, m, factors[1], mean); break;
    case 2: saturation(r, g, b, m, factors[2]); break;
    case 3: hue(r, g, b, m, factors[3]); break;
    }
}

/* work [size * size], line [size + taps] */
static void blur(float *restrict x, float *restrict work, float *restrict line, int size,
                 const float *kernel, int taps)
{
    int radius = taps / 2, reach = radius;
    while (reach && kernel[radius - reach] == 0.0f)
        reach--;
    memset(line, 0, (size + 2 * radius) * sizeof *line);
    for (int y = 0; y < size; y++) {
        const float *row = x + (int64_t)y * size;
        for (int i = 0; i < size; i++)
            line[radius + i] = row[i] * FULL + ROUND - ROUND;
        weigh(kernel + radius - reach, 2 * reach + 1, line + radius - reach, 1, size,
              (float)(1.0 / UNIT), 1.0f, work + (int64_t)y * size);
    }
    for (int y = 0; y < size; y++) {
        int first = y - reach > 0 ? y - reach : 0;
        int last = y + reach < size - 1 ? y + reach : size - 1;
        weigh(kernel + radius + first - y, last - first + 1, work + (int64_t)first * size, size,
              size, (float)(1.0 / UNIT), FROM_FULL, x + (int64_t)y * size);
    }
}

static void to_bytes(const float *restrict x, uint8_t *restrict out, int64_t m)
{
    for (int64_t i = 0; i < m; i++)
        out[i] = (uint8_t)(int32_t)(x[i] * 255.0f + ROUND - ROUND);
}

static void from_bytes(const uint8_t *restrict x, float *restrict out, int64_t m)
{
    for (int64_t i = 0; i < m; i++)
        out[i] = (float)x[i] * TO_UNIT;
}

static void grayscale(float *restrict r, float *restrict g, float *restrict b, int m)
{
    for (int i = 0; i < m; i++)
        r[i] = g[i] = b[i] = luma(r[i], g[i], b[i]);
}

/* One image's jitter and grayscale, in blocks; contrast needs the mean of all blocks first. */
static void distort(const uint8_t *in, float *x, int64_t plane, const float *factors,
                    const int64_t *order, int jitter, int gray)
{
    int stops = 0; /* operations before contrast */
    float mean = 0.0f;
    if (jitter) {
        int64_t sum = 0;
        while (order[stops] != 1)
            stops++;
        for (int64_t at = 0; at < plane; at += BLOCK) {
            int m = (int)(plane - at < BLOCK ? plane - at : BLOCK);
            float *r = x + at, *g = r + plane, *b = g + plane;
            for (int c = 0; c < 3; c++)
                from_bytes(in + c * plane + at, x + c * plane + at, m);
            for (int k = 0; k < stops; k++)
                apply((int)order[k], r, g, b, m, factors, 0.0f);
            sum += luma_steps(r, g, b, m);
        }
        mean = (float)((double)sum / (4096.0 * (double)plane));
    } else {
        from_bytes(in, x, 3 * plane);
    }
    for (int64_t at = 0; at < plane; at += BLOCK) {
        int m = (int)(plane - at < BLOCK ? plane - at : BLOCK);
        float *r = x + at, *g = r + plane, *b = g + plane;
        for (int k = stops; jitter && k < 4; k++)
            apply((int)order[k], r, g, b, m, factors, mean);
        if (gray)
            grayscale(r, g, b, m);
    }
}

/* in, out [n, 3, size, size]; factors [n, 4]; order [n, 4]; jitter, gray, blurred [n];
 * kernels [n, taps], integers over UNIT. Returns 0, or 1 without memory. */
int distort_color(int64_t n, int32_t size, const uint8_t *in, const float *factors,
                   const int64_t *order, const uint8_t *jitter, const uint8_t *gray,
                   const uint8_t *blurred, const float *kernels, int32_t taps, uint8_t *out)
{
    int64_t plane = (int64_t)size * size;
    float *x = malloc(3 * plane * sizeof *x), *work = malloc(plane * sizeof *work);
    float *line = malloc((size + taps) * sizeof *line);
    int failed = !x || !work || !line;
    for (int64_t i = 0; i < n && !failed; i++) {
        const uint8_t *from = in + 3 * plane * i;
        uint8_t *to = out + 3 * plane * i;
        distort(from, x, plane, factors + 4 * i, order + 4 * i, jitter[i], gray[i]);
        int channels = gray[i] ? 1 : 3; /* of a gray image all three are equal */
        for (int c = 0; c < channels && blurred[i]; c++)
            blur(x + c * plane, work, line, size, kernels + (int64_t)taps * i, taps);
        to_bytes(x, to, channels * plane);
        for (int c = channels; c < 3; c++)
            memcpy(to + c * plane, to, plane);
    }
    free(x), free(work), free(line);
    return failed;
}

/* One channel's brightness and contrast, in the order of `order`. */
static void jitter_channel(float *restrict x, int64_t plane, float bright, float strong,
                           const int64_t *order)
{
    for (int k = 0; k < 2; k++) {
        if (order[k] == 0) {
            for (int64_t i = 0; i < plane; i++)
                x[i] = unit(x[i] * bright);
            continue;
        }
        int64_t sum = 0;
        for (int64_t at = 0; at < plane; at += BLOCK) {
            int64_t end = plane - at < BLOCK ? plane : at + BLOCK;
            int32_t part = 0; /* of at most BLOCK * 4097 */
            for (int64_t i = at; i < end; i++)
                part += (int32_t)(x[i] * 4096.0f + ROUND - ROUND);
            sum += part;
        }
        float mean = (float)((double)sum / (4096.0 * (double)plane));
        float rest = (1.0f - strong) * mean;
        for (int64_t i = 0; i < plane; i++)
            x[i] = unit(strong * x[i] + rest);
    }
}

/* in, out [n, channels, size, size]; factors [n, 2, channels]: brightness, contrast; order [n, 2];
 * the rest as above. Returns 0, or 1 without memory. */
int distort_channels(int64_t n, int32_t channels, int32_t size, const uint8_t *in,
                     const float *factors, const int64_t *order, const uint8_t *jitter,
                     const uint8_t *blurred, const float *kernels, int32_t taps, uint8_t *out)
{
    int64_t plane = (int64_t)size * size;
    float *x = malloc(plane * sizeof *x), *work = malloc(plane * sizeof *work);
    float *line = malloc((size + taps) * sizeof *line);
    int failed = !x || !work || !line;
    for (int64_t i = 0; i < n && !failed; i++)
        for (int c = 0; c < channels; c++) {
            const float *own = factors + 2 * channels * i + c;
            int64_t at = (channels * i + c) * plane;
            from_bytes(in + at, x, plane);
            if (jitter[i])
                jitter_channel(x, plane, own[0], own[channels], order + 2 * i);
            if (blurred[i])
                blur(x, work, line, size, kernels + (int64_t)taps * i, taps);
            to_bytes(x, out + at, plane);
        }
    free(x), free(work), free(line);
    return failed;
}
