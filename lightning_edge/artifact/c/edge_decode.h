/* Expands the tensors of a packed .edge file, version 2, into memory that the caller gives. FORMAT.md says what the
 * bytes mean. C99, no allocation, no dependency, no recursion; a file is treated as hostile.
 *
 *     EdgeFile file;
 *     EdgeTensor tensor;
 *     EdgeStatus status = edge_open(bytes, size, &file);
 *     while (status == EDGE_OK && (status = edge_next(&file, &tensor)) == EDGE_OK)
 *         status = edge_decode(&tensor, data, data_size, workspace, workspace_size);
 *     // EDGE_END: every tensor has been expanded; anything else: edge_status_text(status) says what is wrong
 *
 * Tensors come in the order of the file. Their names, and the graph, are in a section compressed by zstd, which is not
 * read here. The file's bytes must stay where they are, unchanged, while its tensors are in use.
 */
#ifndef EDGE_DECODE_H
#define EDGE_DECODE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    EDGE_OK,
    EDGE_END,         /* no tensor is left */
    EDGE_NO_EDGE,     /* the file does not begin as a .edge file does */
    EDGE_VERSION,     /* the file is of another version */
    EDGE_CHECKSUM,    /* header or tensors do not match their checksum */
    EDGE_DAMAGED,     /* lengths do not add up, a value is out of its range, or a stream does not end as it must */
    EDGE_NO_MEMORY    /* the caller's data or workspace are smaller than the tensor says */
} EdgeStatus;

/* Element types, numbered as in ONNX. */
typedef enum {
    EDGE_FLOAT32 = 1, EDGE_UINT8, EDGE_INT8, EDGE_UINT16, EDGE_INT16, EDGE_INT32, EDGE_INT64, EDGE_BOOL = 9,
    EDGE_FLOAT16, EDGE_FLOAT64, EDGE_UINT32, EDGE_UINT64, EDGE_BFLOAT16 = 16
} EdgeDtype;

typedef enum {
    EDGE_CONSTANT, EDGE_RAW, EDGE_HALF, EDGE_PLANES, EDGE_DENSE, EDGE_SPARSE, EDGE_BLOCKS, EDGE_CONTEXT
} EdgeCodec;

enum { EDGE_MAX_DIMENSIONS = 64 };

typedef struct {
    const uint8_t *next, *end;
} EdgeFile;

typedef struct {
    EdgeDtype dtype;
    EdgeCodec codec;
    uint32_t dimensions;
    uint32_t shape[EDGE_MAX_DIMENSIONS];
    uint32_t elements;
    uint32_t element_size;   /* bytes of an element */
    size_t data_size;        /* bytes that edge_decode writes: elements x element_size, at most 2**31 - 1 */
    size_t workspace_size;   /* bytes that edge_decode needs beside them while it runs */
    const uint8_t *payload;
    size_t payload_size;
} EdgeTensor;

/* Checks header, lengths and checksums, and finds the tensors. */
EdgeStatus edge_open(const uint8_t *file, size_t size, EdgeFile *out);

/* Reads what the next tensor is and how much memory it takes. EDGE_END after the last one. */
EdgeStatus edge_next(EdgeFile *file, EdgeTensor *out);

/* Writes the elements, the last dimension running fastest, little-endian on every machine. Neither pointer needs to be
 * aligned; both may be NULL where no byte is needed. What lies in `data` is undefined after any status but EDGE_OK. */
EdgeStatus edge_decode(const EdgeTensor *tensor, void *data, size_t data_size, void *workspace, size_t workspace_size);

/* Returns what a status means, in words. */
const char *edge_status_text(EdgeStatus status);

#ifdef __cplusplus
}
#endif

#endif
