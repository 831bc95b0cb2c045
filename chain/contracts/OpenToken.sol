// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";

/// @title What fees are paid and rewards are claimed in: 18 decimals, a fixed supply, EIP-2612 permits.
/// @dev Without vote checkpoints, which would make every claim 37-70k gas dearer; votes belong to a wrapper.
contract OpenToken is ERC20, ERC20Permit {
    constructor(address holder, uint256 supplyWei) ERC20("Open", "OPEN") ERC20Permit("Open") {
        _mint(holder, supplyWei);
    }
}
