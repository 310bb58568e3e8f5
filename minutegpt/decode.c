// T new tokens of each of B texts through a GPT on a CPU, from their embeddings to the logits after the last ones.
// float32 or int8 weights. native.py calls it.
#include <math.h>
#define EACH(i, n) for (long i = 0; i < (n); i++)
#define SHARE(i, n) _Pragma("omp for") EACH(i, n) // among the threads, which wait for each other at the end
#define SUM(type, i, n, term) ({ type sum = 0; EACH(i, n) sum += (term); sum; })
#define MAX(i, n, term) ({ float max = -INFINITY; EACH(i, n) max = fmaxf(max, (term)); max; })

typedef struct { union { const float *w; const signed char *q; }; const float *scale, *bias; long rows, cols; } matrix;
typedef struct { matrix c_attn, c_proj, c_fc, mlp_proj; float *ln_1[2], *ln_2[2], *k, *v; } block;
typedef struct { long layers, C, H, D, room, qk_norm, kind, threads; float *cos, *sin, *ln_f[2]; matrix lm_head; } gpt;

static float activate(float x, long kind) { // in the order of model.py's ACTIVATIONS; -1: none
    if (kind > 1) return x < 0 ? 0 : kind == 2 ? x : x * x;
    return kind < 0 ? x : x / 2 * (1 + (kind ? tanhf(0.79788456f * (x + 0.044715f * x * x * x)) : erff(0.7071068f * x)));
}

static void norm(float *y, const float *x, long n, float *const *w) { // LayerNorm; without weights RMSNorm
    float mean = w[0] ? SUM(float, i, n, x[i]) / n : 0;
    float variance = SUM(float, i, n, (x[i] - mean) * (x[i] - mean)) / n + (w[0] ? 1e-5f : 1e-6f);
    EACH(i, n) y[i] = (x[i] - mean) / sqrtf(variance) * (w[0] ? w[0][i] : 1) + (w[1] ? w[1][i] : 0);
}

// y = m x, or y += m x, for n vectors x, one every `gap` numbers. With ln, each is normalized first.
static void product(float *y, const matrix *m, const float *x, long gap, long n, float *const *ln, int add, int kind) {
    float in[n][m->cols], step[n];
    short in16[n][m->cols]; // for int8 weights, in 16 bits: processors multiply these fastest
    EACH(j, n) {
        if (ln) norm(in[j], x + j * gap, m->cols, ln); else EACH(i, m->cols) in[j][i] = x[j * gap + i];
        float largest = MAX(i, m->cols, fabsf(in[j][i])), total = SUM(float, i, m->cols, fabsf(in[j][i]));
        step[j] = fmaxf(largest / 32767, total / 16e6f) + 1e-30f; // so that no sum of products overflows 32 bits
        if (m->scale) EACH(i, m->cols) in16[j][i] = (short)rintf(in[j][i] / step[j]);
    }
    SHARE(r, m->rows) EACH(j, n) { // each weight is read from memory once for all vectors
        float sum = m->scale ? SUM(int, i, m->cols, (short)m->q[r * m->cols + i] * in16[j][i]) * step[j] * m->scale[r]
                             : SUM(float, i, m->cols, m->w[r * m->cols + i] * in[j][i]);
        y[j * m->rows + r] = (add ? y[j * m->rows + r] : 0) + activate(sum + (m->bias ? m->bias[r] : 0), kind);
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
        product(qkv, &b->c_attn, x, C, N, b->ln_1, 0, -1);
        SHARE(i, B * m->H) EACH(j, T) { // each head of each text. A token sees itself and those before it
            long t = past + j, at = (i / m->H * T + j) * C, head = i % m->H * D, start = (text * m->H + i) * m->room * D;
            float q[D], p[t + 1], *k = b->k + start, *v = b->v + start, *new = qkv + 3 * at + head, *out = y + at + head;
            const float *cos = m->cos + t * D / 2, *sin = m->sin + t * D / 2;
            turn(q, new, D / 2, cos, sin, m->qk_norm), turn(k + t * D, new + C, D / 2, cos, sin, m->qk_norm);
            EACH(d, D) v[t * D + d] = new[2 * C + d], out[d] = 0;
            float most = MAX(s, t + 1, p[s] = SUM(float, d, D, q[d] * k[s * D + d]) / sqrtf(D));
            float total = SUM(float, s, t + 1, p[s] = expf(p[s] - most));
            EACH(s, t + 1) EACH(d, D) out[d] += p[s] / total * v[s * D + d];
        }
        product(x, &b->c_proj, y, C, N, 0, 1, -1);
        product(hidden, &b->c_fc, x, C, N, b->ln_2, 0, m->kind);
        product(x, &b->mlp_proj, hidden, 4 * C, N, 0, 1, -1);
    }
#pragma omp parallel num_threads(m->threads)
    product(logits, &m->lm_head, x + (T - 1) * C, T * C, B, m->ln_f, 0, -1);
}
