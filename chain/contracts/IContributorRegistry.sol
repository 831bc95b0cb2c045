// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title Who is paid where: a contributor's id is fixed by its first wallet, the wallet may change.
interface IContributorRegistry {
    /// @notice No wallet is on record for `contributorId`.
    error NotRegistered(bytes32 contributorId);
    /// @notice Only the wallet on record may name its successor.
    error NotTheWallet(bytes32 contributorId, address wallet, address caller);
    /// @notice The zero address can hold nothing.
    error ZeroWallet(bytes32 contributorId);

    /// @notice `contributorId` is paid to `wallet` from now on, for the first time.
    event Registered(bytes32 indexed contributorId, address indexed wallet);
    /// @notice `contributorId` is paid to `newWallet` and no longer to `oldWallet`.
    event Rotated(bytes32 indexed contributorId, address indexed oldWallet, address indexed newWallet);

    /// @notice Put wallets on record under the ids that follow from them. Anyone may call, since nobody can
    /// choose an id; a wallet whose id is on record already is passed over, rotated or not.
    function register(address[] calldata wallets) external;

    /// @notice Name the wallet that is paid from now on, for everything not yet claimed.
    function rotate(bytes32 contributorId, address newWallet) external;

    /// @notice The wallet on record, or zero.
    function walletOf(bytes32 contributorId) external view returns (address);

    /// @notice The id that a first wallet fixes.
    /// @dev Python's `attribution.types.contributor_id`: tag with a u32 length, then the address.
    function contributorIdOf(address wallet) external pure returns (bytes32);
}
