/* A CUDA runtime that computes nothing: memory is the host's, a kernel is only counted. For tests/standin_cuda/run.py.
   Every call that is not here is made by run.py: it is counted and succeeds. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
  const char *name;
  long count;
} table[512];
static int names, capturing, current;

void standin_note(const char *name) {
  for (int i = 0; i < names; i++)
    if (!strcmp(table[i].name, name)) {
      table[i].count++;
      return;
    }
  table[names].name = name;
  table[names++].count = 1;
}
void standin_reset(void) { names = 0; }
void standin_write(const char *path) {
  FILE *file = fopen(path, "w");
  for (int i = 0; i < names; i++) fprintf(file, "%s %ld\n", table[i].name, table[i].count);
  fclose(file);
}
#define NOTE standin_note(__func__)
static cudaError_t handle(void *result) {
  *(void **)result = malloc(64);
  return 0;
}
static int kind(void) {
  const char *text = getenv("STANDIN_SM");
  return text ? atoi(text) : 89;
}

/* the device */
cudaError_t cudaGetDeviceCount(int *count) { *count = 2; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = current; return 0; }
cudaError_t cudaSetDevice(int device) { current = device; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
const char *cudaGetErrorString(cudaError_t error) { return "stand-in"; }
const char *cudaGetErrorName(cudaError_t error) { return "stand-in"; }
#undef cudaGetDeviceProperties
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stand-in");
  p->major = kind() / 10, p->minor = kind() % 10;
  p->totalGlobalMem = 24ull << 30, p->l2CacheSize = 72 << 20;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 101376, p->sharedMemPerMultiprocessor = 102400;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->warpSize = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 1536, p->multiProcessorCount = 128;
  for (int i = 0; i < 3; i++) p->maxThreadsDim[i] = 1024, p->maxGridSize[i] = 65535;
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = kind() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = kind() % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = 128; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 101376; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 102400; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 0;
  }
  return 0;
}

/* memory */
static cudaError_t take(void **address, size_t size) {
  *address = aligned_alloc(512, (size + 511) / 512 * 512 + 512);
  if (*address) memset(*address, 0, size);
  return *address ? 0 : cudaErrorMemoryAllocation;
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = 24ull << 30; return 0; }
cudaError_t cudaMalloc(void **address, size_t size) { NOTE; return take(address, size); }
cudaError_t cudaMallocHost(void **address, size_t size) { NOTE; return take(address, size); }
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) { NOTE; return take(address, size); }
cudaError_t cudaMallocFromPoolAsync(void **address, size_t size, cudaMemPool_t pool, cudaStream_t stream) {
  NOTE;
  return take(address, size);
}
cudaError_t cudaFree(void *address) { NOTE; free(address); return 0; }
cudaError_t cudaFreeHost(void *address) { free(address); return 0; }
cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { NOTE; free(address); return 0; }
static cudaError_t copy(void *to, const void *from, size_t size, enum cudaMemcpyKind way) {
  static const char *ways[] = {"copy host to host", "copy host to device", "copy device to host",
                               "copy device to device", "copy"};
  standin_note(ways[way]);
  memcpy(to, from, size);
  return 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind way) {
  return copy(to, from, size, way);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind way, cudaStream_t stream) {
  return copy(to, from, size, way);
}
cudaError_t cudaMemset(void *address, int value, size_t size) { NOTE; memset(address, value, size); return 0; }
cudaError_t cudaMemsetAsync(void *address, int value, size_t size, cudaStream_t stream) {
  NOTE;
  memset(address, value, size);
  return 0;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *address) {
  memset(a, 0, sizeof *a);
  a->type = cudaMemoryTypeDevice, a->devicePointer = (void *)address;
  return 0;
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *p) { return handle(pool); }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
  *(unsigned long long *)value = 0;
  return 0;
}

/* streams, events, graphs */
cudaError_t cudaStreamCreate(cudaStream_t *stream) { NOTE; return handle(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { NOTE; return handle(stream); }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return handle(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return handle(event); }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  standin_note(mode == cudaStreamCaptureModeGlobal ? "capture that forbids other threads' calls" : "capture");
  capturing = 1;
  return 0;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  NOTE;
  capturing = 0;
  return handle(graph);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return 0;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
  NOTE;
  return handle(exec);
}

/* kernels */
static void *fat_binary[4];
static struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} pushed;
void **__cudaRegisterFatBinary(void *binary) { return fat_binary; }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = (cudaKernel_t)function;
  return 0;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void **)stream = pushed.stream;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int b, size_t s,
                                                                   unsigned flags) {
  *blocks = 2;
  return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->ptxVersion = 80, a->binaryVersion = kind();
  return 0;
}
