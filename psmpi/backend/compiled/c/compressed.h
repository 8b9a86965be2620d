/* Dense minibatches of compressed rows. Part of the template kernels.h. */

/* out (features, batch) = the rows `at` (batch,) as columns; row r has the entries [starts[r], starts[r + 1]). Features
 * without an entry are 0. */
void NAME(fill_compressed)(ptrdiff_t batch, ptrdiff_t features, const int64_t *at, const int64_t *starts,
                           const int32_t *columns, const R *values, R *out)
{
    memset(out, 0, (size_t)(features * batch) * sizeof(R));
    for (ptrdiff_t i = 0; i < batch; i++)
        for (int64_t k = starts[at[i]]; k < starts[at[i] + 1]; k++)
            out[columns[k] * batch + i] = values[k];
}
