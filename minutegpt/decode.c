// T new tokens of each of B texts through a GPT on a CPU, from their embeddings to the logits after the last ones.
// float32 or int8 weights. native.py calls it. Loops are written so that compilers make vector instructions of them.
#include <math.h>
#define EACH(i, n) for (long i = 0; i < (n); i++)
#define SHARE(i, n) _Pragma("omp for") EACH(i, n) // among the threads, which wait for each other at the end
#define SUM(i, n, term) ({ float sum = 0; EACH(i, n) sum += (term); sum; })

typedef struct { union { const float *w; const signed char *q; }; const float *scale, *bias; long rows, cols; } matrix;
typedef struct { matrix c_attn, c_proj, c_fc, mlp_proj; float *ln_1[2], *ln_2[2], *k, *v; } block;
typedef struct { long layers, C, H, D, room, qk_norm, kind, threads; float *cos, *sin, *ln_f[2]; matrix lm_head; } gpt;

static float power(float x) { // e^x = 2^n e^r, with r near 0. Unlike expf, it is not a call
    float n = rintf(1.442695f * (x = x < -87 ? -87 : x > 88 ? 88 : x)), r = x - n * 0.6931472f;
    union { int bits; float value; } two_n = {((int)n + 127) << 23};
    return two_n.value * (1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720))))));
}

static void activate(float *x, long n, long kind) { // in the order of model.py's ACTIVATIONS
    if (kind == 0) EACH(i, n) { // the error function by formula 7.1.26 of Abramowitz and Stegun
        float z = 0.7071068f * fabsf(x[i]), t = 1 / (1 + 0.3275911f * z);
        float p = t * (0.2548296f + t * (-0.2844967f + t * (1.4214137f + t * (-1.4531520f + t * 1.0614054f))));
        x[i] = x[i] / 2 + fabsf(x[i]) / 2 * (1 - p * power(-z * z));
    } else if (kind == 1) EACH(i, n) x[i] /= 1 + power(-1.5957691f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
    else EACH(i, n) x[i] = x[i] < 0 ? 0 : kind == 2 ? x[i] : x[i] * x[i];
}

static void norm(float *y, const float *x, long n, float *const *w) { // LayerNorm; without weights RMSNorm
    float mean = w[0] ? SUM(i, n, x[i]) / n : 0;
    float variance = SUM(i, n, (x[i] - mean) * (x[i] - mean)) / n + (w[0] ? 1e-5f : 1e-6f);
    EACH(i, n) y[i] = (x[i] - mean) / sqrtf(variance) * (w[0] ? w[0][i] : 1) + (w[1] ? w[1][i] : 0);
}

// Rows of m times vectors, R rows times N vectors at once. What is read is then used several times; but one vector is
// fastest with one row after the other, as memory is read
#define DOT(R, N, type, w, in) for (; n % N == 0 && r + R <= end; r += R) for (long j = 0; j < n; j += N) { \
    type sum[R][N] = {0}; \
    EACH(i, m->cols) EACH(a, R) EACH(b, N) sum[a][b] += w[(r + a) * m->cols + i] * in[j + b][i]; \
    EACH(a, R) EACH(b, N) { \
        float *to = y + (j + b) * m->rows + r + a, scale = m->scale ? step[j + b] * m->scale[r + a] : 1; \
        *to = (add ? *to : 0) + sum[a][b] * scale + (m->bias ? m->bias[r + a] : 0); } }

// y = m x, or y += m x, for n vectors x, one every `gap` numbers. With ln, each is normalized first.
static void product(float *y, const matrix *m, const float *x, long gap, long n, float *const *ln, int add) {
    float in[n][m->cols], step[n];
    short in16[n][m->cols]; // for int8 weights, in 16 bits: processors multiply these fastest
    EACH(j, n) {
        if (ln) norm(in[j], x + j * gap, m->cols, ln); else EACH(i, m->cols) in[j][i] = x[j * gap + i];
        float largest = 1e-30f, total = SUM(i, m->cols, fabsf(in[j][i]));
        EACH(i, m->cols) largest = fabsf(in[j][i]) > largest ? fabsf(in[j][i]) : largest;
        step[j] = largest > total / 488 ? largest / 32767 : total / 488 / 32767; // so that no sum overflows 32 bits
        if (m->scale) EACH(i, m->cols) in16[j][i] = (short)rintf(in[j][i] / step[j]);
    }
    SHARE(g, (m->rows + 7) / 8) {
        long r = 8 * g, end = r + 8 < m->rows ? r + 8 : m->rows;
        if (m->scale) { DOT(4, 4, int, (short)m->q, in16) DOT(1, 1, int, (short)m->q, in16) }
        else { DOT(4, 4, float, m->w, in) DOT(1, 1, float, m->w, in) }
    }
}

static void turn(float *y, const float *x, long n, const float *cos, const float *sin, long qk_norm) { // of one head
    EACH(i, n) y[i] = x[i] * cos[i] + x[i + n] * sin[i], y[i + n] = x[i + n] * cos[i] - x[i] * sin[i];
    if (qk_norm) norm(y, y, 2 * n, (float *const[2]){0});
}

// x (B, T, C) is changed in place, the logits (B, V) are written. The texts are number `text` and later ones in the KV
// cache, which has `past` of `room` positions.
void decode(const gpt *m, const block *blocks, long text, long past, long B, long T, float *x, float *logits) {
    long C = m->C, D = m->D, N = B * T;
    float qkv[3 * N * C], y[N * C], hidden[4 * N * C]; // all threads share these
#pragma omp parallel num_threads(m->threads)
    for (const block *b = blocks; b < blocks + m->layers; b++) {
        product(qkv, &b->c_attn, x, C, N, b->ln_1, 0);
        SHARE(i, B * m->H) EACH(j, T) { // each head of each text. A token sees itself and those before it
            long t = past + j, at = (i / m->H * T + j) * C, head = i % m->H * D, start = (text * m->H + i) * m->room * D;
            float q[D], p[t + 1], *k = b->k + start, *v = b->v + start, *new = qkv + 3 * at + head, *out = y + at + head;
            const float *cos = m->cos + t * D / 2, *sin = m->sin + t * D / 2;
            turn(q, new, D / 2, cos, sin, m->qk_norm), turn(k + t * D, new + C, D / 2, cos, sin, m->qk_norm);
            EACH(d, D) v[t * D + d] = new[2 * C + d], out[d] = 0;
            float most = -INFINITY, total = 0;
            EACH(s, t + 1) p[s] = SUM(d, D, q[d] * k[s * D + d]) / sqrtf(D), most = p[s] > most ? p[s] : most;
            EACH(s, t + 1) total += p[s] = power(p[s] - most);
            EACH(s, t + 1) EACH(d, D) out[d] += p[s] / total * v[s * D + d];
        }
        product(x, &b->c_proj, y, C, N, 0, 1);
        product(hidden, &b->c_fc, x, C, N, b->ln_2, 0);
        SHARE(i, 4 * N) activate(hidden + i * C, C, m->kind);
        product(x, &b->mlp_proj, hidden, 4 * C, N, 0, 1);
    }
#pragma omp parallel num_threads(m->threads)
    product(logits, &m->lm_head, x + (T - 1) * C, T * C, B, m->ln_f, 0);
}
