// One token through a GPT on a CPU, from its embedding to the logits; float32 or int8 weights. native.py calls it.
#include <math.h>
#define EACH(i, n) for (long i = 0; i < (n); i++)
#define SHARE(i, n) _Pragma("omp for") EACH(i, n) // among the threads, which wait for each other at the end
#define SUM(type, i, n, term) ({ type sum = 0; EACH(i, n) sum += (term); sum; })

typedef struct { union { const float *w; const signed char *q; }; const float *scale, *bias; long rows, cols; } matrix;
typedef struct { matrix c_attn, c_proj, c_fc, mlp_proj; const float *ln_1[2], *ln_2[2]; float *k, *v; } block;
typedef struct { long layers, C, H, D, room, qk_norm, activation, threads; matrix lm_head; const float *ln_f[2]; } gpt;

static float activate(float x, long kind) { // in the order of model.py's ACTIVATIONS; -1: none
    if (kind == 0) return 0.5f * x * (1 + erff(0.70710678f * x));
    if (kind == 1) return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    return kind < 0 ? x : x < 0 ? 0 : kind == 2 ? x : x * x;
}

static void norm(float *y, const float *x, long n, const float *const *w) { // LayerNorm; without weights RMSNorm
    float mean = w[0] ? SUM(float, i, n, x[i]) / n : 0;
    float variance = SUM(float, i, n, (x[i] - mean) * (x[i] - mean)) / n + (w[0] ? 1e-5f : 1e-6f);
    EACH(i, n) y[i] = (x[i] - mean) / sqrtf(variance) * (w[0] ? w[0][i] : 1) + (w[1] ? w[1][i] : 0);
}

// y = m x, or y += m x. With ln, x is normalized first.
static void product(float *y, const matrix *m, const float *x, const float *const *ln, long add, long kind) {
    float in[m->cols], largest = 0, total = 0;
    short rounded[m->cols]; // for int8 weights, in 16 bits: processors multiply these fastest
    if (ln) norm(in, x, m->cols, ln); else EACH(i, m->cols) in[i] = x[i];
    EACH(i, m->cols) largest = fmaxf(largest, fabsf(in[i])), total += fabsf(in[i]);
    float step = fmaxf(largest / 32767, total / 16e6f) + 1e-30f; // so that no sum of products overflows 32 bits
    EACH(i, m->cols) rounded[i] = (short)rintf(in[i] / step);
    SHARE(r, m->rows) {
        float sum = !m->scale ? SUM(float, i, m->cols, m->w[r * m->cols + i] * in[i])
                              : SUM(int, i, m->cols, (short)m->q[r * m->cols + i] * rounded[i]) * step * m->scale[r];
        y[r] = (add ? y[r] : 0) + activate(sum + (m->bias ? m->bias[r] : 0), kind);
    }
}

static void turn(float *y, const float *x, long n, const float *cos, const float *sin, long qk_norm) { // of one head
    EACH(i, n) y[i] = x[i] * cos[i] + x[i + n] * sin[i], y[i + n] = x[i + n] * cos[i] - x[i] * sin[i];
    if (qk_norm) norm(y, y, 2 * n, (const float *const[2]){0});
}

// x (C) is changed in place, the logits (V) are written. The KV cache has `past` of `room` positions.
void decode(const gpt *m, const block *blocks, long past, float *x, const float *cos, const float *sin, float *logits) {
    long C = m->C, D = m->D;
    float qkv[3 * C], y[C], hidden[4 * C]; // all threads share these
#pragma omp parallel num_threads(m->threads)
    {
        for (const block *b = blocks; b < blocks + m->layers; b++) {
            product(qkv, &b->c_attn, x, b->ln_1, 0, -1);
            SHARE(i, m->H) {
                float *k = b->k + i * m->room * D, *v = b->v + i * m->room * D;
                float q[D], p[past + 1], most = -INFINITY, total = 0;
                turn(q, qkv + i * D, D / 2, cos, sin, m->qk_norm);
                turn(k + past * D, qkv + C + i * D, D / 2, cos, sin, m->qk_norm);
                EACH(j, D) v[past * D + j] = qkv[2 * C + i * D + j], y[i * D + j] = 0;
                EACH(t, past + 1) most = fmaxf(most, p[t] = SUM(float, j, D, q[j] * k[t * D + j]) / sqrtf(D));
                EACH(t, past + 1) total += p[t] = expf(p[t] - most);
                EACH(t, past + 1) EACH(j, D) y[i * D + j] += p[t] / total * v[t * D + j];
            }
            product(x, &b->c_proj, y, 0, 1, -1);
            product(hidden, &b->c_fc, x, b->ln_2, 0, m->activation);
            product(x, &b->mlp_proj, hidden, 0, 1, -1);
        }
        product(logits, &m->lm_head, x, m->ln_f, 0, -1);
    }
}
