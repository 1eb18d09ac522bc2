// saliency_contrast on a GPU: one launch sums squares, the next divides and subtracts. A warp takes a piece
// of a row; none waits for another.
#include "diffcam/saliency_contrast.h"
#include "elements.h"

namespace diffcam {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 3;           // of a multiprocessor, at the least: more would leave too few registers
constexpr int kGroup = 4;            // elements that a thread takes at once
constexpr int kPiece = 1024;         // elements of a warp, more where there would be too many pieces
constexpr int64_t kMostPieces = 64;  // of a row, whose sums every warp of it adds up
constexpr int64_t kMostElements = int64_t{1} << 30;  // of a row, which are counted in int
constexpr int64_t kTurns = 32;  // blocks of a multiprocessor that are launched, at the most
constexpr int kScales = 3;      // sums that are kept of each piece: as they are, of small and of large values

// How the elements of a row are read.
enum class Access : int {
    groups,   // they lie side by side, the first of each row at a multiple of a group's bytes
    uniform,  // one stride leads from each position to the next
    single    // any strides
};

// The rows of a map: of an image, of a rival, and of channels that share an energy.
struct Rows {
    ConstView view;
    int64_t count, first_piece, position_stride;
    int targets;
    Access access;
};

struct Task {
    Rows saliency, rivals;
    int size[kSpatialRank], positions;
    int elements, piece;     // of a row, of a warp's piece
    int rows, row_channels;  // rows of an image and a target; channels of a row
    int pieces;              // of a row
    void* sums;              // of the pieces of all rows, those of saliency first
    void* contrast;
};

// Where row `row` begins: the rows of an image and a target come one after the other.
template <typename E>
__device__ __forceinline__ const E* row_start(const Task& task, const Rows& rows, int64_t row) {
    const int64_t map = row / task.rows;
    return static_cast<const E*>(rows.view.data) + map / rows.targets * rows.view.image_stride +
           map % rows.targets * rows.view.target_stride +
           row % task.rows * task.row_channels * rows.view.channel_stride;
}

// Where element i of a row lies behind its beginning.
__device__ __forceinline__ int64_t element_offset(const Task& task, const Rows& rows, int i) {
    if (rows.access == Access::groups) return i;
    const int channel = task.row_channels == 1 ? 0 : i / task.positions;
    const int position = i - channel * task.positions;
    const int64_t start = channel * rows.view.channel_stride;
    if (rows.access == Access::uniform) return start + position * rows.position_stride;
    const int line = position / task.size[2], column = position - line * task.size[2];
    const int plane = line / task.size[1], row = line - plane * task.size[1];
    return start + plane * rows.view.spatial_stride[0] + row * rows.view.spatial_stride[1] +
           column * rows.view.spatial_stride[2];
}

// Elements [i, i + count) of a row, zeros after them.
template <typename E>
__device__ __forceinline__ void load_group(const Task& task, const Rows& rows, const E* start, int i,
                                           int count, Accumulator<E>* values) {
    if (rows.access == Access::groups && count == kGroup) {
        const Pack<E, kGroup> pack = *reinterpret_cast<const Pack<E, kGroup>*>(start + i);
        for (int k = 0; k < kGroup; ++k) values[k] = widen(pack.element[k]);
        return;
    }
    for (int k = 0; k < kGroup; ++k)
        values[k] = k < count ? widen(start[element_offset(task, rows, i + k)]) : Accumulator<E>(0);
}

// Calls body(first element, count) for the groups of a piece that are the lane's.
template <typename Body>
__device__ __forceinline__ void for_groups(const Task& task, int piece, Body body) {
    const int begin = piece * task.piece, end = min(task.elements - begin, task.piece) + begin;
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int i = begin + kGroup * lane; i < end; i += kGroup * 32) body(i, min(kGroup, end - i));
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

__device__ __forceinline__ int64_t first_item() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; }
__device__ __forceinline__ int64_t item_step() { return int64_t{gridDim.x} * kWarps; }

template <typename E>
__global__ void __launch_bounds__(kThreads, kBlocks) saliency_energies(Task task) {
    using T = Accumulator<E>;
    const int64_t items = (task.saliency.count + task.rivals.count) * task.pieces;
    for (int64_t item = first_item(); item < items; item += item_step()) {
        const Rows& rows = item < task.rivals.first_piece ? task.saliency : task.rivals;
        const int64_t own = item - rows.first_piece;
        const E* start = row_start<E>(task, rows, own / task.pieces);
        T plain = 0, small = 0, large = 0;
        for_groups(task, static_cast<int>(own % task.pieces), [&](int i, int count) {
            T values[kGroup];
            load_group(task, rows, start, i, count, values);
            for (int k = 0; k < kGroup; ++k) {
                const T x = values[k], up = x * EnergyScales<T>::small, down = x * EnergyScales<T>::large;
                plain += x * x;
                small += up * up;
                large += down * down;
            }
        });
        plain = warp_sum(plain);
        small = warp_sum(small);
        large = warp_sum(large);
        if (threadIdx.x % 32 == 0) {
            T* out = static_cast<T*>(task.sums) + kScales * item;
            out[0] = plain;
            out[1] = small;
            out[2] = large;
        }
    }
}

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

// Brings a value to energy 1.
template <typename T>
struct Unit {
    T scale = 1, divisor;

    // Called by all lanes of a warp.
    __device__ __forceinline__ Unit(const Task& task, const Rows& rows, int64_t row) {
        const T* sums = static_cast<const T*>(task.sums) + kScales * (rows.first_piece + row * task.pieces);
        T plain = 0, small = 0, large = 0;
        for (int piece = threadIdx.x % 32; piece < task.pieces; piece += 32) {
            plain += sums[kScales * piece];
            small += sums[kScales * piece + 1];
            large += sums[kScales * piece + 2];
        }
        T energy = warp_sum(plain);
        small = warp_sum(small);
        large = warp_sum(large);
        if (energy < EnergyScales<T>::least) {
            energy = small;
            scale = EnergyScales<T>::small;
        } else if (!(energy <= EnergyScales<T>::most)) {
            energy = large;
            scale = EnergyScales<T>::large;
        }
        // Zeros stay zeros. What shares an energy that is not finite becomes NaN.
        divisor = energy == 0 ? T(1) : energy <= EnergyScales<T>::most ? root(energy) : energy - energy;
    }

    // Divided, not multiplied: products could be fused with the difference, and rounded differently.
    __device__ __forceinline__ T operator()(T x) const { return x * scale / divisor; }
};

template <typename E>
__global__ void __launch_bounds__(kThreads, kBlocks) saliency_difference(Task task) {
    using T = Accumulator<E>;
    const int64_t items = task.rivals.count * task.pieces;
    const bool stores_groups = task.elements % kGroup == 0;
    for (int64_t turn = first_item(); turn < items; turn += item_step()) {
        // Backwards: what was summed last is still in the cache.
        const int64_t item = items - 1 - turn, row = item / task.pieces, map = row / task.rows;
        const int64_t own_row = map / task.rivals.targets * task.rows + row % task.rows;
        const Unit<T> own_unit(task, task.saliency, own_row), rival_unit(task, task.rivals, row);
        const E* own = row_start<E>(task, task.saliency, own_row);
        const E* rival = row_start<E>(task, task.rivals, row);
        T* out = static_cast<T*>(task.contrast) + row * task.elements;
        for_groups(task, static_cast<int>(item % task.pieces), [&](int i, int count) {
            T a[kGroup], b[kGroup];
            load_group(task, task.saliency, own, i, count, a);
            load_group(task, task.rivals, rival, i, count, b);
            Pack<T, kGroup> found;
            for (int k = 0; k < kGroup; ++k) {
                const T difference = own_unit(a[k]) - rival_unit(b[k]);
                found.element[k] = difference < 0 ? T(0) : difference;
            }
            if (stores_groups) {
                *reinterpret_cast<Pack<T, kGroup>*>(out + i) = found;
                return;
            }
            for (int k = 0; k < kGroup; ++k)
                if (k < count) out[i + k] = found.element[k];
        });
    }
}

// Launching
// ------------------------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t elements_of(const SaliencyContrastShape& shape) {
    return shape.row_channels() * shape.extent.positions();
}

int64_t piece_of(const SaliencyContrastShape& shape) {
    return kPiece * ceil_div(elements_of(shape), kMostPieces * kPiece);
}

int64_t pieces_of(const SaliencyContrastShape& shape) {
    return ceil_div(elements_of(shape), piece_of(shape));
}

bool nothing_to_do(const SaliencyContrastShape& shape) {
    return shape.images * shape.targets * shape.channels * shape.extent.positions() == 0;
}

Rows rows_of(const SaliencyContrastShape& shape, const ConstView& view, int64_t targets) {
    // One stride for all positions, where there is one. Strides of dimensions of size one say nothing.
    bool uniform = true;
    int64_t stride = 1, inner = 1;
    for (int d = kSpatialRank - 1; d >= 0; --d) {
        if (shape.extent.size[d] == 1) continue;
        if (inner == 1) stride = view.spatial_stride[d];
        uniform = uniform && view.spatial_stride[d] == inner * stride;
        inner *= shape.extent.size[d];
    }
    const auto aligned = [](int64_t count, int64_t step) { return count == 1 || step % kGroup == 0; };
    const int64_t bytes = kGroup * scalar_bytes(shape.type);
    const bool groups = uniform && stride == 1 &&
                        (shape.row_channels() == 1 || view.channel_stride == inner) &&
                        reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(bytes) == 0 &&
                        aligned(shape.images, view.image_stride) && aligned(targets, view.target_stride) &&
                        aligned(shape.channels, view.channel_stride);
    const Access access = groups ? Access::groups : uniform ? Access::uniform : Access::single;
    return {view, shape.images * targets * shape.rows(), 0, stride, static_cast<int>(targets), access};
}

}  // namespace

int64_t saliency_contrast_cuda_scratch_bytes(const SaliencyContrastShape& shape, const CudaQueue&) {
    if (nothing_to_do(shape)) return 0;
    const int64_t rows = shape.images * (1 + shape.targets) * shape.rows();
    return rows * pieces_of(shape) * kScales * (shape.type == ScalarType::float64 ? 8 : 4);
}

int saliency_contrast_cuda(const SaliencyContrastShape& shape, const ConstView& saliency,
                           const ConstView& rivals, void* contrast, void* scratch, const CudaQueue& queue) {
    if (nothing_to_do(shape)) return cudaSuccess;
    if (elements_of(shape) > kMostElements || shape.targets > kMostElements || shape.channels > kMostElements)
        return cudaErrorInvalidValue;
    Task task{};
    task.saliency = rows_of(shape, saliency, 1);
    task.rivals = rows_of(shape, rivals, shape.targets);
    for (int d = 0; d < kSpatialRank; ++d) task.size[d] = static_cast<int>(shape.extent.size[d]);
    task.positions = static_cast<int>(shape.extent.positions());
    task.elements = static_cast<int>(elements_of(shape));
    task.piece = static_cast<int>(piece_of(shape));
    task.pieces = static_cast<int>(pieces_of(shape));
    task.rivals.first_piece = task.saliency.count * task.pieces;
    task.rows = static_cast<int>(shape.rows());
    task.row_channels = static_cast<int>(shape.row_channels());
    task.sums = scratch;
    task.contrast = contrast;
    return with_element_type(shape.type, [&](auto element) {
        using E = decltype(element);
        const auto queue_up = [&](void (*kernel)(Task), int64_t rows) {
            const int64_t wanted = ceil_div(rows * task.pieces, kWarps);
            const int64_t most = queue.multiprocessors * kTurns;
            const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most)), block(kThreads);
            return launch(kernel, grid, block, 0, 1, queue.stream, task);
        };
        const int error = queue_up(saliency_energies<E>, task.saliency.count + task.rivals.count);
        return error == cudaSuccess ? queue_up(saliency_difference<E>, task.rivals.count) : error;
    });
}

}  // namespace diffcam
